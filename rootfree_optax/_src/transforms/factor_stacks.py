"""The factors of inverse-free root-free Shampoo on a plan's stacks, and what is kept beside them: made and renewed."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from rootfree_optax._src.blocks import factor_start, factor_update
from rootfree_optax._src.common import schedules
from rootfree_optax._src.mesh.stacks_on_mesh import ShardedPlan
from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.rounding import saturate
from rootfree_optax._src.stacks import refresh as refreshing
from rootfree_optax._src.stacks import stacks
from rootfree_optax._src.stacks.each_stack import Given
from rootfree_optax._src.stacks.kronecker_options import (
    REFRESHES,
    FactorOptions,
    require_inverse_roots,
    require_symmetric,
)


class FactorStacks(NamedTuple):
    """What `ScaleBySirfShampooState` holds of the curvature, see there."""

    factors: Any
    momenta: Any
    products: Any
    started: Any
    observed: Any


def initial(plan: ShardedPlan, params: optax.Params, options: FactorOptions) -> FactorStacks:
    """Returns the factors before the first step, and what is kept beside them.

    Raises:
      ValueError: for a structure that has no such refresh or no such products.
    """
    if options.refresh == "exact":
        require_inverse_roots(plan)
    if options.cache_products:
        require_symmetric(plan)
    curvature = 1.0 if isinstance(options.initial_scale, str) else options.initial_scale
    factors = stacks.initial_factors(plan, params, options.preconditioner_dtype, curvature=curvature)
    return FactorStacks(
        factors,
        momenta=() if options.riemannian_momentum is None else stacks.zeros_like(plan, factors),
        products=jax.tree.map(_squared, factors) if options.cache_products else (),  # of multiples of I
        started=stacks.not_started(plan, factors) if options.waits_for_gradient else (),
        observed=() if options.curvature_every is None else stacks.nothing_observed(plan, factors),
    )


def _squared(part: jax.Array) -> jax.Array:
    return saturate(jnp.square(upcast(part)), part.dtype)


def renewed(
    plan: ShardedPlan,
    curvatures: Given,
    old: FactorStacks,
    options: FactorOptions,
    *,
    preconditioner_lr: ArrayLike,
    damping: ArrayLike,
    batch_size: ArrayLike,
    count: jax.Array,
) -> FactorStacks:
    """Returns the factors after a step: blocks start, observe and are refreshed, each where it is due.

    Args:
      plan: the plan of the stacks.
      curvatures: the stacks that the curvature is estimated from, or a function that returns them.
      old: what the last step has left.
      options: what is done when.
      preconditioner_lr: β₂ of this step.
      damping: λ of this step.
      batch_size: B of this step.
      count: the step's number.
    """
    factors, momenta, products, started, observed = old
    if options.waits_for_gradient:
        start = functools.partial(factor_start.start, damping=damping, batch_size=batch_size)
        factors, products, started = refreshing.start(plan, start, curvatures, (factors, products, started))
    if options.curvature_every is not None:
        observe = functools.partial(factor_update.observe, batch_size=batch_size, precision=options.precision)
        due = schedules.is_due(options.curvature_every, count)
        observed = refreshing.observe_when(due, plan, observe, curvatures, factors, observed)
    refresh = functools.partial(
        factor_update.refresh,
        preconditioner_lr=preconditioner_lr,
        damping=damping,
        riemannian_momentum=0.0 if options.riemannian_momentum is None else options.riemannian_momentum,
        batch_size=batch_size,
        count=count,
        refresh_factor=REFRESHES[options.refresh],
        precision=options.precision,
    )
    if options.staggered:
        period = schedules.require_static_interval(options.update_every)
        refresh_stacks = functools.partial(refreshing.refresh_in_turn, count, period)
    else:
        refresh_stacks = functools.partial(refreshing.refresh_when, schedules.is_due(options.update_every, count))
    return FactorStacks(*refresh_stacks(plan, refresh, curvatures, (factors, momenta, products, started, observed)))

"""Adam's rescaling with an ε relative to each parameter, for the parameters that have no factors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.diagonal import adam_step, first_moment, limit_to_squares, second_moment
from rootfree_optax._src.blocks.momentum import total_weight
from rootfree_optax._src.common import schedules, trees, validate
from rootfree_optax._src.numerics.dtypes import dtype_like, dtype_of_squares, upcast


class RelativeAdamState(NamedTuple):
    """State of `scale_by_relative_adam`: how many updates there have been, and the two averages."""

    step: jax.Array
    mu: Any
    nu: Any


def scale_by_relative_adam(
    b1: ArrayLike = 0.9,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients as Adam does, with an ε that is relative to the parameter's own gradients.

        m ← b1·m + (1 − b1)·g,   v ← b2·v + (1 − b2)·g²,   direction = m̂ / (√v̂ + ε·√mean(v̂))

    So a multiple of the loss has the same directions. A non-finite gradient shows in one direction, and leaves its
    entries of m and v as they were.

    Args:
      b1: decay of m, in [0, 1). A number or a traced scalar.
      b2: decay of v, in [0, 1). A number, a traced scalar or a schedule; its bias correction assumes a constant.
      eps: ε ≥ 0. A number, a traced scalar or a schedule.
      mu_dtype: floating-point dtype of m; by default each parameter's own.
      nu_dtype: floating-point dtype of v; by default each parameter's own, float32 for float16.

    Returns:
      A transformation.

    Raises:
      ValueError: for a Python number out of range.
      TypeError: for a schedule where none may be.

    Example:
      >>> import jax.numpy as jnp
      >>> from rootfree_optax._src.transforms.adam import scale_by_relative_adam
      >>> tx = scale_by_relative_adam()
      >>> direction, state = tx.update(1e-12 * jnp.ones(2), tx.init(jnp.zeros(2)))
      >>> print(direction)
      [1. 1.]
    """
    validate.require_constant(b1=b1)
    validate.require_fraction("b1", b1)
    validate.require_fraction("b2", b2)
    validate.require_at_least("eps", eps, 0)
    validate.require_floating_dtype("mu_dtype", mu_dtype)
    validate.require_floating_dtype("nu_dtype", nu_dtype)

    def init(params: optax.Params) -> RelativeAdamState:
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype_like(p, mu_dtype)), params)
        nu = jax.tree.map(lambda p: jnp.zeros_like(p, nu_dtype or dtype_of_squares(p)), params)
        return RelativeAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: RelativeAdamState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RelativeAdamState]:
        del params, extra_args
        step = optax.safe_increment(state.step)
        updates = jax.tree.map(limit_to_squares, updates)
        decay, epsilon = schedules.value_at(b2, state.step), schedules.value_at(eps, state.step)
        square = functools.partial(second_moment, decay=decay, batch_size=1, count=state.step)
        nu = trees.map_accumulators(square, state.nu, updates)
        averages, mu = trees.map_pairs(lambda g, m: first_moment(m, g, decay=b1), updates, state.mu)
        weights = total_weight(b1, step), total_weight(decay, step)

        def direct(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            m, v = m / weights[0].astype(m.dtype), upcast(v) / weights[1].astype(upcast(v).dtype)
            return adam_step(m, v, eps=epsilon).astype(g.dtype)

        return trees.map_gradients(direct, updates, averages, nu), RelativeAdamState(step, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)

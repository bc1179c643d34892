"""The links of a chain besides the preconditioner: weight decay, momentum and learning rate.

`optax.add_decayed_weights` and `optax.trace` multiply arrays by their hyperparameter as it comes. A traced float32
number or a schedule then turns bfloat16 updates into float32 ones, so that `lax.scan` refuses the state, and is an
error under strict dtype promotion. The links below compute in at least float32 and keep every array's dtype, but for
gradients that are narrower than their parameters: their updates are as wide as the parameters, so that a small decay or
learning rate is not lost. Their states call a step count `step`, so that the chain has one `count`, the
preconditioner's, for `optax.tree.get`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.momentum import add_scaled, average_heavy_ball, total_weight
from rootfree_optax._src.common import schedules, trees, validate
from rootfree_optax._src.numerics.arithmetic import dtype_beside, upcast
from rootfree_optax._src.transforms.accumulators import init_average
from rootfree_optax._src.transforms.origin import (
    Origin,
    describe_tree,
    dtype_name,
    make_origin,
    nan_unless,
    require_origin,
)

MaskOrFn = Any | Callable[[optax.Params], Any] | None


class LinkState(NamedTuple):
    """State of a link that has a schedule: how many updates there have been."""

    step: jax.Array


def _init_step(params: optax.Params) -> LinkState:
    del params
    return LinkState(jnp.zeros([], jnp.int32))


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule | None, mask: MaskOrFn = None
) -> optax.GradientTransformationExtraArgs:
    """Adds weight_decay·θ to the updates, as `optax.add_decayed_weights`, for arrays of any dtype.

    The state is the same whatever the decay and the mask are, so that both may change in training.

    Args:
      weight_decay: κ ≥ 0. A number, a traced scalar or a schedule. None adds nothing and needs no parameters.
      mask: which parameters decay: a tree of booleans like the parameters (or a prefix), or a callable that makes one
        from the parameters. None decays all.

    Returns:
      A transformation whose `update` needs `params`, if something decays.

    Raises:
      ValueError: for a negative Python number; at `update` without parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rootfree_optax._src.optimizers.links import add_decayed_weights
      >>> tx = add_decayed_weights(optax.linear_schedule(0.0, 0.1, 10))
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> updates, state = tx.update(jnp.zeros(2, jnp.bfloat16), tx.init(params), params)
      >>> updates.dtype
      dtype(bfloat16)
    """
    validate.require_number("weight_decay", weight_decay, validate.NON_NEGATIVE, optional=True)

    def update(
        updates: optax.Updates, state: LinkState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LinkState]:
        del extra_args
        after = LinkState(optax.safe_increment(state.step))
        if weight_decay is None:
            return updates, after
        if params is None:
            raise ValueError("weight decay needs the parameters: call tx.update(grads, state, params).")
        # Once in the program, for all parameters.
        factor = jnp.asarray(schedules.value_at("weight_decay", weight_decay, state.step))
        decay = optax.stateless(functools.partial(trees.map_gradients, functools.partial(_add_scaled, factor)))
        if mask is not None:
            decay = optax.masked(decay, mask)
        return decay.update(updates, decay.init(params), params)[0], after

    return optax.GradientTransformationExtraArgs(_init_step, update)


class HeavyBallState(NamedTuple):
    """State of `heavy_ball`.

    Attributes:
      step: how many updates there have been.
      momentum: a tree like the parameters; None without momentum.
      origin: what the state belongs to, see `rf.check`.
    """

    step: jax.Array
    momentum: Any
    origin: Any


def heavy_ball(
    momentum: ArrayLike | None, *, average: bool = False, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds up past updates, v ← momentum·v + update, as `optax.trace`, for arrays of any dtype.

    A non-finite update shows in one step, and leaves its entries of v as they were.

    Args:
      momentum: α₁, in [0, 1). A number or a traced scalar; None changes nothing and keeps no v.
      average: whether the update is divided by the sum of its weights, which makes it an average that starts right.
      mu_dtype: floating-point dtype of v; by default each parameter's own.

    Returns:
      A transformation that replaces the updates by v, in the updates' dtype.

    Raises:
      ValueError: for a Python number outside [0, 1).
      TypeError: for a schedule.

    Example:
      >>> import jax.numpy as jnp
      >>> from rootfree_optax._src.optimizers.links import heavy_ball
      >>> tx = heavy_ball(0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> for _ in range(3):
      ...     velocity, state = tx.update(jnp.ones(()), state)
      >>> print(velocity)
      1.75
    """
    validate.require_number("momentum", momentum, validate.FRACTION, schedule=False, optional=True)
    validate.require_floating_dtype("mu_dtype", mu_dtype)
    options = {"momentum": validate.kind_of(momentum), "mu_dtype": dtype_name(mu_dtype)}
    text_if = lambda has_parameters: describe_tree(options, jnp.zeros([]) if has_parameters else None)

    def init(params: optax.Params) -> HeavyBallState:
        velocity = None if momentum is None else init_average(params, mu_dtype)
        origin = make_origin(text_if(jax.tree.leaves(params)), params)
        return HeavyBallState(jnp.zeros([], jnp.int32), velocity, origin)

    def update(
        updates: optax.Updates, state: HeavyBallState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HeavyBallState]:
        del params, extra_args
        # The keys of the momentum are the parameters' names, if there is one.
        is_own = require_origin(state.origin, text_if(isinstance(state.origin, Origin)))
        step = optax.safe_increment(state.step)
        if momentum is None:
            return updates, state._replace(step=step)
        scale = jnp.asarray(1 - momentum, jnp.float32) / total_weight(momentum, step) if average else None
        add = functools.partial(_average, jnp.asarray(nan_unless(is_own, momentum)), scale)
        updates, velocity = trees.map_steps(add, updates, state.momentum)
        return updates, HeavyBallState(step, velocity, state.origin)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by −learning_rate, in their dtype or a wider one of the parameters, if these are given.

    Args:
      learning_rate: at least 0. A number, a traced scalar or a schedule. The state is the same for all of these.

    Raises:
      ValueError: for a negative or infinite number. To ascend, negate the gradients.
      TypeError: for anything else, such as a string.
    """
    validate.require_number("learning_rate", learning_rate, validate.LEARNING_RATE)

    def update(
        updates: optax.Updates, state: LinkState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LinkState]:
        del extra_args
        factor = -jnp.asarray(schedules.value_at("learning_rate", learning_rate, state.step))
        beside = updates if params is None else params
        updates = trees.map_gradients(functools.partial(_multiply, factor), updates, beside)
        return updates, LinkState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(_init_step, update)


def descend(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule | None,
    mask: MaskOrFn = None,
    momentum: optax.GradientTransformation | None = None,
) -> tuple[optax.GradientTransformation, ...]:
    """Returns the links from a direction D to an update, −learning_rate·(D + κθ).

    Args:
      learning_rate: a number, a traced scalar or a schedule.
      weight_decay: κ ≥ 0; None adds nothing.
      mask: which parameters decay.
      momentum: averages D + κθ before the learning rate, so that decay is coupled with it; None averages nothing.
    """
    return (
        add_decayed_weights(weight_decay, mask),
        optax.identity() if momentum is None else momentum,
        scale_by_learning_rate(learning_rate),
    )


# Compiled functions of one array, so that arrays of one shape are traced once, and are in the program once.


@jax.jit
def _add_scaled(factor: ArrayLike, update: jax.Array, param: jax.Array) -> jax.Array:
    dtype = dtype_beside(update, param)
    return add_scaled(update.astype(dtype), factor, param).astype(dtype)


@jax.jit
def _average(
    momentum: ArrayLike, scale: ArrayLike | None, update: jax.Array, velocity: jax.Array
) -> tuple[jax.Array, jax.Array]:
    total, new = average_heavy_ball(velocity, update, momentum, nesterov=False)
    average = total if scale is None else jnp.asarray(scale, total.dtype) * total
    return average.astype(update.dtype), new


@jax.jit
def _multiply(factor: ArrayLike, update: jax.Array, param: ArrayLike) -> jax.Array:
    dtype = dtype_beside(update, param)
    wide = upcast(update.astype(dtype))
    return (jnp.asarray(factor, wide.dtype) * wide).astype(dtype)

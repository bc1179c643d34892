"""The links of a chain besides the preconditioner: weight decay, momentum and learning rate.

`optax.add_decayed_weights` and `optax.trace` multiply arrays by their hyperparameter as it comes. A traced float32
number or a schedule then turns bfloat16 updates into float32 ones, so that `lax.scan` refuses the state, and is an
error under strict dtype promotion. The links below compute in at least float32 and keep every array's dtype. Their
states call a step count `step`, so that the chain has one `count`, the preconditioner's, for `optax.tree.get`.
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
from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.transforms.accumulators import init_average

MaskOrFn = Any | Callable[[optax.Params], Any] | None


class LinkState(NamedTuple):
    """State of a link that has a schedule: how many updates there have been."""

    step: jax.Array


def _init_step(params: optax.Params) -> LinkState:
    del params
    return LinkState(jnp.zeros([], jnp.int32))


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: MaskOrFn = None
) -> optax.GradientTransformationExtraArgs:
    """Adds weight_decay·θ to the updates, as `optax.add_decayed_weights`, for arrays of any dtype.

    Args:
      weight_decay: κ ≥ 0. A number, a traced scalar or a schedule.
      mask: which parameters decay: a tree of booleans like the parameters (or a prefix), or a callable that makes one
        from the parameters. None decays all.

    Returns:
      A transformation whose `update` needs `params`.

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
    validate.require_number("weight_decay", weight_decay, validate.NON_NEGATIVE)

    def update(
        updates: optax.Updates, state: LinkState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LinkState]:
        del extra_args
        if params is None:
            raise ValueError("weight decay needs the parameters: call tx.update(grads, state, params).")
        factor = jnp.asarray(
            schedules.value_at("weight_decay", weight_decay, state.step)
        )  # once in the program, for all parameters
        updates = trees.map_gradients(functools.partial(_add_scaled, factor), updates, params)
        return updates, LinkState(optax.safe_increment(state.step))

    transformation = optax.GradientTransformationExtraArgs(_init_step, update)
    return transformation if mask is None else optax.masked(transformation, mask)


class HeavyBallState(NamedTuple):
    """State of `heavy_ball`: how many updates there have been, and the momentum, a tree like the parameters."""

    step: jax.Array
    momentum: Any


def heavy_ball(
    momentum: ArrayLike | None, *, average: bool = False, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds up past updates, v ← momentum·v + update, as `optax.trace`, for arrays of any dtype.

    A non-finite update shows in one step, and leaves its entries of v as they were.

    Args:
      momentum: α₁, in [0, 1). A number or a traced scalar; None changes nothing and keeps no state.
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
    if momentum is None:
        return optax.with_extra_args_support(optax.identity())

    def init(params: optax.Params) -> HeavyBallState:
        return HeavyBallState(jnp.zeros([], jnp.int32), init_average(params, mu_dtype))

    def update(
        updates: optax.Updates, state: HeavyBallState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HeavyBallState]:
        del params, extra_args
        step = optax.safe_increment(state.step)
        scale = jnp.asarray(1 - momentum, jnp.float32) / total_weight(momentum, step) if average else None
        add = functools.partial(_average, jnp.asarray(momentum), scale)
        updates, velocity = trees.map_steps(add, updates, state.momentum)
        return updates, HeavyBallState(step, velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by −learning_rate, keeping their dtype.

    Args:
      learning_rate: at least 0. A number, a traced scalar or a schedule. The state is the same for all of these.

    Raises:
      ValueError: for a negative or infinite number.
      TypeError: for anything else, such as a string.
    """
    validate.require_number("learning_rate", learning_rate, validate.NON_NEGATIVE)

    def update(
        updates: optax.Updates, state: LinkState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LinkState]:
        del params, extra_args
        factor = -jnp.asarray(schedules.value_at("learning_rate", learning_rate, state.step))
        updates = trees.map_gradients(functools.partial(_multiply, factor), updates)
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
      weight_decay: κ ≥ 0; None adds nothing, and keeps no state.
      mask: which parameters decay.
      momentum: averages D + κθ before the learning rate, so that decay is coupled with it; None averages nothing.
    """
    return (
        optax.identity() if weight_decay is None else add_decayed_weights(weight_decay, mask),
        optax.identity() if momentum is None else momentum,
        scale_by_learning_rate(learning_rate),
    )


# Compiled functions of one array, so that arrays of one shape are traced once, and are in the program once.


@jax.jit
def _add_scaled(factor: ArrayLike, update: jax.Array, param: jax.Array) -> jax.Array:
    return add_scaled(update, factor, param).astype(update.dtype)


@jax.jit
def _average(
    momentum: ArrayLike, scale: ArrayLike | None, update: jax.Array, velocity: jax.Array
) -> tuple[jax.Array, jax.Array]:
    total, new = average_heavy_ball(velocity, update, momentum, nesterov=False)
    average = total if scale is None else jnp.asarray(scale, total.dtype) * total
    return average.astype(update.dtype), new


@jax.jit
def _multiply(factor: ArrayLike, update: jax.Array) -> jax.Array:
    wide = upcast(update)
    return (jnp.asarray(factor, wide.dtype) * wide).astype(update.dtype)

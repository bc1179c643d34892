"""The links of a chain besides the preconditioner: weight decay and momentum, for hyperparameters that may be traced.

`optax.add_decayed_weights` and `optax.trace` multiply arrays by their hyperparameter as it comes. A traced float32
number or a schedule then turns bfloat16 updates into float32 ones, so that `lax.scan` refuses the state, and is an
error under strict dtype promotion. The two below compute in at least float32 and keep every array's dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.momentum import add_scaled
from rootfree_optax._src.common import schedules, trees, validate
from rootfree_optax._src.numerics.dtypes import dtype_like, has_smaller_range
from rootfree_optax._src.numerics.rounding import saturate

MaskOrFn = Any | Callable[[optax.Params], Any] | None


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`: the step count, for a schedule."""

    count: jax.Array  # type: ignore[assignment]  # Optax names it so, and tuples have a method of that name


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: MaskOrFn = None
) -> optax.GradientTransformationExtraArgs:
    """Adds weight_decay·θ to the updates, as `optax.add_decayed_weights`, whatever the dtypes.

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
    validate.require_at_least("weight_decay", weight_decay, 0)

    def init(params: optax.Params) -> AddDecayedWeightsState:
        del params
        return AddDecayedWeightsState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: AddDecayedWeightsState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AddDecayedWeightsState]:
        del extra_args
        if params is None:
            raise ValueError("weight decay needs the parameters: call tx.update(grads, state, params).")
        factor = schedules.value_at(weight_decay, state.count)
        updates = trees.map_gradients(lambda u, p: add_scaled(u, factor, p).astype(u.dtype), updates, params)
        return updates, AddDecayedWeightsState(optax.safe_increment(state.count))

    transformation = optax.GradientTransformationExtraArgs(init, update)
    return transformation if mask is None else optax.masked(transformation, mask)


class HeavyBallState(NamedTuple):
    """State of `heavy_ball`: the momentum, a tree like the parameters."""

    momentum: Any


def heavy_ball(
    momentum: ArrayLike, *, nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds up past updates, v ← momentum·v + update, as `optax.trace`, whatever the dtypes.

    As there, a non-finite update makes v non-finite for good: a test of every entry would be a third of the program.
    `optax.apply_if_finite` keeps out gradients that are not finite.

    Args:
      momentum: α₁, in [0, 1). A number or a traced scalar.
      nesterov: whether the update is update + momentum·v, with the new v, rather than v.
      accumulator_dtype: floating-point dtype of v; by default each parameter's own.

    Returns:
      A transformation that replaces the updates by v (or Nesterov's), in the updates' dtype.

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
    validate.require_constant(momentum=momentum)
    validate.require_fraction("momentum", momentum)
    validate.require_floating_dtype("accumulator_dtype", accumulator_dtype)

    def init(params: optax.Params) -> HeavyBallState:
        return HeavyBallState(jax.tree.map(lambda p: jnp.zeros_like(p, dtype_like(p, accumulator_dtype)), params))

    def update(
        updates: optax.Updates, state: HeavyBallState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HeavyBallState]:
        del params, extra_args
        add_past = lambda u, v: add_scaled(u, momentum, v)
        averages = trees.map_gradients(add_past, updates, state.momentum)
        velocity = trees.map_accumulators(_stored, state.momentum, averages)
        if nesterov:
            averages = trees.map_gradients(add_past, updates, averages)
        averages = trees.map_gradients(lambda u, average: average.astype(u.dtype), updates, averages)
        return averages, HeavyBallState(velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def _stored(velocity: jax.Array, average: jax.Array) -> jax.Array:
    """Returns the average in the velocity's dtype; beyond a narrower range at its end, not infinite for good."""
    narrower = has_smaller_range(velocity.dtype, average.dtype)
    return saturate(average, velocity.dtype) if narrower else average.astype(velocity.dtype)


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies updates by −learning_rate, keeping their dtype.

    A number becomes a constant schedule: `optax.scale_by_schedule` casts its value to each update's dtype, which
    `optax.scale` does not, and the state keeps one structure whether or not the learning rate is a schedule.
    """
    schedule = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    return optax.scale_by_learning_rate(schedule)


def descent(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule | None,
    mask: MaskOrFn = None,
    velocity: optax.GradientTransformation | None = None,
) -> tuple[optax.GradientTransformation, ...]:
    """Returns the links that make steps of directions: decay, v ← velocity of (direction + κθ), and −learning_rate·v.

    Weight decay and velocity of None are left out, and keep no state.
    """
    return (
        optax.identity() if weight_decay is None else add_decayed_weights(weight_decay, mask),
        optax.identity() if velocity is None else velocity,
        scale_by_learning_rate(learning_rate),
    )

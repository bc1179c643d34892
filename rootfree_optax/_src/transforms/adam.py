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
from rootfree_optax._src.transforms.accumulators import init_average, init_squares


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
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients as Adam does, with an ε that is relative to the parameter's own gradients.

        m ← b1·m + (1 − b1)·g,   v ← b2·v + (1 − b2)·g²,   direction = m̂ / (√v̂ + ε·√mean(v̂))

    So a multiple of the loss has the same directions, as long as float32 holds the squares: above 1e-18.
    A non-finite gradient shows in one direction, and leaves its entries of m and v as they were.

    Args:
      b1: decay of m, in [0, 1). A number or a traced scalar.
      b2: decay of v, in [0, 1). A number, a traced scalar or a schedule; its bias correction assumes a constant.
      eps: ε ≥ 0. A number, a traced scalar or a schedule.
      mu_dtype: floating-point dtype of m; by default each parameter's own. v has that, or float32 for float16.

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
      >>> print(direction.round(3))
      [1. 1.]
    """
    validate.require_number("b1", b1, validate.FRACTION, schedule=False)
    validate.require_number("b2", b2, validate.FRACTION)
    validate.require_number("eps", eps, validate.NON_NEGATIVE)
    validate.require_floating_dtype("mu_dtype", mu_dtype)

    def init(params: optax.Params) -> RelativeAdamState:
        return RelativeAdamState(jnp.zeros([], jnp.int32), init_average(params, mu_dtype), init_squares(params))

    def update(
        updates: optax.Updates, state: RelativeAdamState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RelativeAdamState]:
        del params, extra_args
        step = optax.safe_increment(state.step)
        decay, epsilon = schedules.value_at("b2", b2, state.step), schedules.value_at("eps", eps, state.step)
        numbers = _Numbers(
            b1=jnp.asarray(b1),
            b2=jnp.asarray(decay),
            eps=jnp.asarray(epsilon),
            mu_weight=total_weight(b1, step),
            nu_weight=total_weight(decay, step),
        )
        directions, mu, nu = trees.map_steps(functools.partial(_step, numbers, state.step), updates, state.mu, state.nu)
        return directions, RelativeAdamState(step, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


class _Numbers(NamedTuple):
    """The numbers of one step, the same for all parameters."""

    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    mu_weight: jax.Array
    nu_weight: jax.Array


@jax.jit  # so that arrays of one shape are traced once, and are in the program once
def _step(
    numbers: _Numbers, count: jax.Array, gradient: jax.Array, m: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a parameter's direction, m and v."""
    gradient = limit_to_squares(gradient)
    v = second_moment(v, gradient, decay=numbers.b2, batch_size=1, count=count)
    average, m = first_moment(m, gradient, decay=numbers.b1)
    # Both corrections are one factor of m, so that v needs no corrected copy.
    corrected = average * (jnp.sqrt(numbers.nu_weight) / numbers.mu_weight).astype(average.dtype)
    return adam_step(corrected, v, eps=numbers.eps).astype(gradient.dtype), m, v

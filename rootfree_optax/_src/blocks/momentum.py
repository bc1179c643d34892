"""Heavy-ball momentum of one array."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.numerics.arithmetic import has_smaller_range, saturate, truncate, upcast


def add_scaled(array: jax.Array, factor: ArrayLike, other: ArrayLike) -> jax.Array:
    """Returns array + factor·other, in at least single precision."""
    wide = upcast(array)
    return wide + jnp.asarray(factor, wide.dtype) * jnp.asarray(other, wide.dtype)


def keep_finite(old: jax.Array, average: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the average to step along, and the new momentum, in the dtype of the old.

    Entries of the momentum that would not be finite keep their old value. So one bad gradient shows in one update, and
    does not poison later ones.

    Args:
      old: the momentum.
      average: of the momentum and the update, in at least single precision.
      update: what is averaged.
    """
    narrow = (truncate if has_smaller_range(old.dtype, average.dtype) else saturate)(average, old.dtype)
    new = jnp.where(jnp.isfinite(average), narrow, old)
    if new.dtype == average.dtype:
        # The same average, from the new momentum: the old one has no later reader, and is overwritten in place.
        average = new + jnp.where(jnp.isfinite(update), 0, update).astype(new.dtype)
    return average, new


def average_heavy_ball(
    velocity: jax.Array, update: jax.Array, momentum: ArrayLike, *, nesterov: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the average to step along, in at least single precision, and the new velocity.

        v ← momentum·v + update,    average = v, or update + momentum·v with Nesterov

    Args:
      velocity: v, any shape.
      update: of v's shape.
      momentum: in [0, 1), a scalar.
      nesterov: whether the average is Nesterov's.
    """
    average, new = keep_finite(velocity, add_scaled(update, momentum, velocity), update)
    return add_scaled(update, momentum, average) if nesterov else average, new


def total_weight(decay: ArrayLike, count: jax.Array) -> jax.Array:
    """Returns 1 − decay^count, what the weights of a moving average from zero add up to after `count` ≥ 1 steps.

    Computed as −expm1(count·log1p(−(1 − decay))), because 1 − decay^count cancels for decay near 1.
    """
    rate = jnp.log1p(-jnp.asarray(1 - decay, jnp.float32))
    return -jnp.expm1(count.astype(jnp.float32) * rate)

"""The mathematics of heavy-ball momentum, for one array."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.rounding import saturate


def add_scaled(array: jax.Array, factor: ArrayLike, other: ArrayLike) -> jax.Array:
    """Returns array + factor·other, in at least single precision."""
    wide = upcast(array)
    return wide + jnp.asarray(factor, wide.dtype) * jnp.asarray(other, wide.dtype)


def kept(velocity: jax.Array, average: jax.Array, update: jax.Array) -> jax.Array:
    """Returns the new velocity, of the dtype of the old: the average, but for entries whose update is not finite.

    These stay as they were: the update has shown that it is not finite, and later ones need not.

    Args:
      velocity: v, what was kept so far.
      average: update + momentum·v.
      update: what is averaged.
    """
    return jnp.where(jnp.isfinite(update), saturate(average, velocity.dtype), velocity)

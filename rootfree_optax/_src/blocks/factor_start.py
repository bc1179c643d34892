"""Where the factors of ONE block start: at the scale of its first gradient that says something."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.finite import max_abs
from rootfree_optax._src.numerics.rounding import saturate
from rootfree_optax._src.structures.base import Parts, Structure


def is_first(gradient: jax.Array, started: jax.Array) -> jax.Array:
    """Returns whether a gradient is the first to say something: neither all zero nor not finite. A scalar."""
    largest = max_abs((gradient,))
    return ~started & (largest > 0) & jnp.isfinite(largest)


def start(
    gradient: jax.Array,
    factors: tuple[Parts, ...],
    products: tuple[Parts, ...],
    first: jax.Array,
    *,
    structures: Sequence[Structure],
    damping: ArrayLike,
    batch_size: ArrayLike,
) -> tuple[tuple[Parts, ...], tuple[Parts, ...]]:
    """Scales a block's factors to its first gradient, once: Kₙ ← (B·mean(g²) + λ)^(−1/2N)·Kₙ.

    The mean is over the entries that are not zero: the rows of an embedding that a mini-batch does not touch say
    nothing about the curvature of those that it does.

    Args:
      gradient: G, [d₁, …, d_N] or [samples, d₁, …, d_N].
      factors: the parts of each Kₙ.
      products: the parts of each KₙKₙᵀ, or empty.
      first: whether this is the first gradient, a scalar, see `is_first`; nothing is done if not.
      structures: the structure of each factor.
      damping: λ ≥ 0.
      batch_size: B > 0.

    Returns:
      The factors and the products.
    """
    g = jnp.abs(upcast(gradient))
    largest = jnp.max(g)
    unit = g / jnp.where(first, largest, 1)  # its squares do not overflow
    mean_square = jnp.sum(jnp.square(unit)) / jnp.maximum(jnp.sum(unit > 0, dtype=g.dtype), 1)
    root = jnp.hypot(
        largest * jnp.sqrt(jnp.asarray(batch_size, g.dtype) * mean_square), jnp.sqrt(jnp.asarray(damping, g.dtype))
    )
    factor = jnp.where(first, root ** (-1 / len(structures)), 1)

    def scaled(part: jax.Array, by: jax.Array) -> jax.Array:
        wide = upcast(part)
        return saturate(wide * by.astype(wide.dtype), part.dtype)

    return (
        jax.tree.map(lambda part: scaled(part, factor), factors),
        jax.tree.map(lambda part: scaled(part, jnp.square(factor)), products),
    )

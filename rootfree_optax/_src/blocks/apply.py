"""How the factors of ONE block apply to its gradient, and how long the direction may become."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.factor_step import times_scalar
from rootfree_optax._src.blocks.folding import fold, fold_axes
from rootfree_optax._src.numerics.dtypes import has_smaller_range, upcast
from rootfree_optax._src.numerics.finite import max_abs
from rootfree_optax._src.numerics.rounding import exponent_of, power_of_two
from rootfree_optax._src.structures.base import Parts, Structure


def precondition(
    gradient: jax.Array,
    factors: tuple[Parts, ...],
    *,
    structures: Sequence[Structure],
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns G multiplied along every axis n by KₙKₙᵀ. An entry of G that is not finite makes its own of it so.

    Args:
      gradient: G, [d₁, …, d_N].
      factors: the parts of each Kₙ.
      structures: the structure of each factor.
      precision: of every product.

    Returns:
      The direction, [d₁, …, d_N], in the accumulation dtype.
    """
    return _multiplied(gradient, factors, structures, lambda s: (s.apply_transposed, s.apply), precision)


def precondition_by_squares(
    gradient: jax.Array,
    products: tuple[Parts, ...],
    *,
    structures: Sequence[Structure],
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns what `precondition` does, from the parts of each KₙKₙᵀ."""
    return _multiplied(gradient, products, structures, lambda s: (s.apply,), precision)


def _multiplied(
    gradient: jax.Array,
    matrices: tuple[Parts, ...],
    structures: Sequence[Structure],
    products: Callable[[Structure], Sequence[Callable[..., jax.Array]]],
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """Returns G after one or more products with every matrix along its axis.

    Where the matrices' dtype has a narrower range than the accumulation dtype (float16), each of them enters divided by
    a power of two near its largest entry, and so do G and the products on the way; the result is scaled back. So no
    intermediate leaves that range before the result itself does. Elsewhere this would be two passes over the factors
    for nothing: `balance` keeps them so close that an intermediate is out of range only where the result is, too.
    """
    _, folded_structures, folded_matrices = fold(structures, matrices)
    direction = fold_axes(upcast(gradient), len(structures), folded_structures)
    rescale = jnp.ones((), direction.dtype)
    for axis, (structure, parts) in enumerate(zip(folded_structures, folded_matrices, strict=True)):
        multiplications = products(structure)
        if has_smaller_range(parts[0].dtype, direction.dtype):
            scale = power_of_two(exponent_of(max_abs(parts))).astype(rescale.dtype)
            unit = power_of_two(exponent_of(jnp.max(jnp.abs(direction)))).astype(rescale.dtype)
            direction, parts = direction / unit, times_scalar(parts, 1 / scale)
            rescale = rescale * unit * scale ** len(multiplications)
        for multiply in multiplications:
            direction = multiply(parts, direction, axis, precision=precision)
    return (direction * rescale).reshape(gradient.shape)


def precondition_within(
    gradient: jax.Array,
    matrices: tuple[Parts, ...],
    *,
    structures: Sequence[Structure],
    precondition: Callable[..., jax.Array],
    trust_radius: ArrayLike,
    batch_size: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns what `precondition` makes of a gradient and its factors, or their products, `shortened`."""
    direction = precondition(gradient, matrices, structures=structures, precision=precision)
    return shortened(direction, gradient, trust_radius=trust_radius, batch_size=batch_size)


def shortened(
    direction: jax.Array,
    gradient: jax.Array,
    *,
    trust_radius: ArrayLike,
    batch_size: ArrayLike,
) -> jax.Array:
    """Returns a direction no longer than the trust radius, in the metric of the curvature that made it of a gradient.

        D · min(1, r / √(B·mean(G·D))),   where D = K₁K₁ᵀ ⊗ … ⊗ K_NK_Nᵀ G

    Args:
      direction: D, [d₁, …, d_N], as it is if it is not finite.
      gradient: G, [d₁, …, d_N].
      trust_radius: r > 0.
      batch_size: B > 0.
    """
    as_scalar = lambda number: jnp.asarray(number, direction.dtype)
    largest = jnp.max(jnp.abs(direction))
    unit = jnp.where(largest > 0, largest, 1)  # G·D itself may overflow where both are finite
    mean = jnp.mean(upcast(gradient) * (direction / unit))
    # Not the root of zero, whose derivative is infinite. A comparison with NaN is false.
    length = jnp.sqrt(as_scalar(batch_size) * jnp.where(mean > 0, mean, 1)) * jnp.sqrt(unit)
    is_long = (mean > 0) & (length > as_scalar(trust_radius)) & jnp.isfinite(length)
    return direction * jnp.where(is_long, as_scalar(trust_radius) / length, 1)

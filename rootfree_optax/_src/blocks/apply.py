"""How the factors of ONE block apply to a tensor, and how long a direction may become."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.folding import fold, fold_axes
from rootfree_optax._src.numerics.dtypes import has_smaller_range, upcast
from rootfree_optax._src.numerics.finite import max_abs
from rootfree_optax._src.numerics.rounding import exponent_of, power_of_two
from rootfree_optax._src.structures.base import Parts, Structure, times_scalar


def apply_factors(
    tensor: jax.Array,
    matrices: Sequence[Parts],
    *,
    structures: Sequence[Structure],
    transposed_first: bool,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns a tensor multiplied along every axis n by KₙKₙᵀ, or by Kₙ alone.

    Where the matrices' dtype has a smaller range than the accumulation dtype (float16), each matrix enters divided by a
    power of two near its largest entry, and so do the tensor and the products on the way; the result is scaled back. So
    no intermediate leaves that range before the result itself does. Elsewhere this would be two passes over the factors
    without any use: `balance` keeps the factors so close that an intermediate overflows only where the result does.

    Args:
      tensor: [d₁, …, d_N]. A non-finite entry makes the same entry of the result non-finite.
      matrices: the parts of each matrix.
      structures: the structure of each matrix.
      transposed_first: whether each axis is multiplied by Kᵀ and then by K, rather than by K alone.
      precision: of every product.

    Returns:
      The product, [d₁, …, d_N], in the accumulation dtype.
    """
    folded = fold(structures, matrices)
    result = fold_axes(upcast(tensor), len(structures), folded.structures)
    rescale = jnp.ones((), result.dtype)
    for axis, (structure, parts) in enumerate(zip(folded.structures, folded.matrices, strict=True)):
        if has_smaller_range(parts[0].dtype, result.dtype):
            scale = power_of_two(exponent_of(max_abs(parts))).astype(rescale.dtype)
            unit = power_of_two(exponent_of(jnp.max(jnp.abs(result)))).astype(rescale.dtype)
            result, parts = result / unit, times_scalar(parts, 1 / scale)
            rescale = rescale * unit * scale ** (1 + transposed_first)
        if transposed_first:
            result = structure.apply_transposed(parts, result, axis, precision=precision)
        result = structure.apply(parts, result, axis, precision=precision)
    return (result * rescale).reshape(tensor.shape)


def clip_to_trust_radius(
    direction: jax.Array, gradient: jax.Array, *, trust_radius: ArrayLike, batch_size: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns a direction no longer than the trust radius in the metric of its curvature, and whether it was longer.

        D · min(1, r / √(B·mean(G·D))),   where D = K₁K₁ᵀ ⊗ … ⊗ K_NK_Nᵀ G

    Args:
      direction: D, [d₁, …, d_N]. A non-finite direction is returned as it is.
      gradient: G, [d₁, …, d_N].
      trust_radius: r > 0.
      batch_size: B > 0.
    """
    as_scalar = lambda number: jnp.asarray(number, direction.dtype)
    largest = jnp.max(jnp.abs(direction))
    unit = jnp.where(largest > 0, largest, 1)  # G·D itself may overflow where both are finite
    mean = jnp.mean(upcast(gradient) * (direction / unit))
    # The root of a positive number: the derivative of the root of zero is infinite. Comparisons with NaN are false.
    length = jnp.sqrt(as_scalar(batch_size) * jnp.where(mean > 0, mean, 1)) * jnp.sqrt(unit)
    is_long = (mean > 0) & (length > as_scalar(trust_radius)) & jnp.isfinite(length)
    return direction * jnp.where(is_long, as_scalar(trust_radius) / length, 1), is_long

"""Arithmetic in floating point of any width: what to compute in, products, powers of two, sizes, and rounding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import ArrayLike, DTypeLike

# 2³² divided by the golden ratio: consecutive multiples, modulo 2³², are spread as evenly as a sequence can be.
_GOLDEN_STRIDE = 0x9E3779B9


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the real part of a floating-point or complex dtype."""
    return jnp.dtype(jnp.finfo(dtype).dtype)


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the real dtype to compute in: float64 for double precision, float32 otherwise."""
    return np.promote_types(jnp.finfo(dtype).dtype, np.float32)


def is_low_precision(dtype: DTypeLike) -> bool:
    """Returns whether a real floating-point dtype has fewer bits than its accumulation dtype."""
    return bool(jnp.finfo(dtype).bits < 32)


def has_smaller_range(dtype: DTypeLike, other: DTypeLike) -> bool:
    """Returns whether the largest number of a floating-point dtype is below another dtype's: float16's is."""
    return bool(jnp.finfo(dtype).maxexp < jnp.finfo(other).maxexp)


def dtype_of_squares(array: jax.Array) -> jnp.dtype:
    """Returns the real dtype to store averages of an array's squares: its own, or float32 for float16.

    The square of a number below 2⁻¹² or above 2⁸ is no float16.
    """
    own = real_dtype(jnp.result_type(array))
    return np.promote_types(own, np.float32) if has_smaller_range(own, np.float32) else own


def dtype_like(array: jax.Array, real: DTypeLike | None) -> jnp.dtype:
    """Returns the dtype of state for `array`: `real`, or the complex dtype of that precision for a complex array.

    Args:
      array: an array or a Python number.
      real: a real floating-point dtype, or None for the dtype of `array` itself. Below single precision there is no
        complex dtype; a complex array then gets complex64.
    """
    own = jnp.result_type(array)
    if real is None:
        return own
    return np.promote_types(real, np.complex64) if jnp.issubdtype(own, jnp.complexfloating) else jnp.dtype(real)


def dtype_beside(array: jax.Array, param: ArrayLike) -> jnp.dtype:
    """Returns the dtype of an update for a parameter: the array's, or a wider one of the parameter's precision."""
    return np.promote_types(array.dtype, jnp.result_type(param))


def upcast(array: jax.Array) -> jax.Array:
    """Casts a real or complex array to at least single precision."""
    return array.astype(np.promote_types(array.dtype, np.float32))


def einsum(subscripts: str, *operands: jax.Array, precision: PrecisionLike) -> jax.Array:
    """Returns an einsum that is accumulated, and returned, in the operands' accumulation dtype."""
    wide = [upcast(operand) for operand in operands]
    if operands[0].dtype != jnp.bfloat16:
        return jnp.einsum(subscripts, *wide, precision=precision)
    # XLA for CPUs fails at run time on some products of bfloat16 arrays. So the arrays are passed in float32, which
    # holds them exactly. Accelerators may multiply them in their bfloat16 units, which is exact, too.
    units = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return jax.lax.platform_dependent(
        *wide,
        cpu=lambda *arrays: jnp.einsum(subscripts, *arrays),
        default=lambda *arrays: jnp.einsum(subscripts, *arrays, precision=units),
    )


def matmul(left: jax.Array, right: jax.Array, *, dtype: DTypeLike | None = None, precision: PrecisionLike) -> jax.Array:
    """Returns the product of matrices [..., i, j] and [..., j, k], in the accumulation dtype.

    Args:
      left: [..., i, j].
      right: [..., j, k].
      dtype: what both are rounded to first; None: nothing.
      precision: of the product.
    """
    factors = (left, right) if dtype is None else (left.astype(dtype), right.astype(dtype))
    return einsum("...ij,...jk->...ik", *factors, precision=precision)


def exponent_of(number: jax.Array) -> jax.Array:
    """Returns e with 2ᵉ ≤ x < 2ᵉ⁺¹, an int32, for x ≥ 0 rounded to float32; zero where x is zero or subnormal.

    It reads the bits, because `jnp.frexp` and `jnp.ldexp` would take a tenth of an optimizer's whole program.
    """
    bits = jax.lax.bitcast_convert_type(number.astype(jnp.float32), jnp.int32) >> 23
    return jnp.where(bits > 0, bits - 127, 0)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2ᵉ as float32, for an int32 e between −126 and 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def max_abs(parts: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the largest absolute value of all parts, a scalar; non-finite if any entry is non-finite.

    The bits of the absolute values are compared as integers. They are ordered as the values are, with NaN above all.
    XLA's maximum of floating-point numbers may drop a NaN on a CPU.
    """
    of_bits = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[parts[0].dtype.itemsize]
    largest = [jnp.max(jax.lax.bitcast_convert_type(jnp.abs(part), of_bits), initial=0) for part in parts]
    return jax.lax.bitcast_convert_type(functools.reduce(jnp.maximum, largest), parts[0].dtype)


def measure_entries(array: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns mean(|a|), √mean(|a|²) and max(|a|), scalars, none of which over- or underflows."""
    size = jnp.abs(array)
    largest = jnp.max(size, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return jnp.mean(size / unit) * unit, jnp.sqrt(jnp.mean(jnp.square(size / unit))) * unit, largest


def all_finite(tree: object) -> jax.Array:
    """Returns whether every entry of every array is finite, a scalar."""
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])


def saturate(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts `array` to `dtype`. Real entries outside of the range of either dtype become the end of that range."""
    if jnp.iscomplexobj(array):
        return array.astype(dtype)
    limit = jnp.asarray(min(float(jnp.finfo(dtype).max), float(jnp.finfo(array.dtype).max)), array.dtype)
    return jax.lax.clamp(-limit, array, limit).astype(dtype)


def truncate(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts an array to fewer bits, a real one towards zero; entries outside of the range become the end of it.

    A decaying average, rounded to nearest, would end at a few times the smallest number and stay there for ever.
    """
    nearest = saturate(array, dtype)
    if jnp.iscomplexobj(nearest):
        return nearest
    is_beyond = jnp.abs(nearest).astype(array.dtype) > jnp.abs(array)
    bits = jax.lax.bitcast_convert_type(nearest, {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[nearest.dtype.itemsize])
    return jax.lax.bitcast_convert_type(bits - is_beyond.astype(bits.dtype), dtype)


def round_dithered(array: jax.Array, dtype: DTypeLike, count: jax.Array) -> jax.Array:
    """Rounds to a dtype of fewer bits so that the error averages to zero over consecutive steps.

    Rounding to nearest stalls a slow moving average in half precision: bfloat16 resolves relative changes of 2⁻⁸,
    and 1 − decay is often smaller. Here, an offset between zero and one unit in the last place is added to the
    magnitude, which is then rounded down; the average over the offsets is exact. The offsets are a fixed
    equidistributed sequence in the step count, the same for all entries. Nothing is random: equal steps give equal
    bits.

    Args:
      array: real array, any shape.
      dtype: a real floating-point dtype. If it has as many bits as the dtype of `array` or more, nothing is added.
      count: the step's number, a scalar integer.

    Returns:
      The rounded array, of `dtype`, with the derivatives of `array`.
    """
    if jnp.finfo(dtype).bits >= jnp.finfo(array.dtype).bits:
        return array.astype(dtype)
    return _round_dithered(array, jnp.dtype(dtype), count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_dithered(array: jax.Array, dtype: jnp.dtype, count: jax.Array) -> jax.Array:
    phase = count.astype(jnp.uint32) * jnp.uint32(_GOLDEN_STRIDE)
    # Works on the bits: a sum over the digits that will be dropped carries into the digits that stay. This takes two
    # integer operations, while frexp and ldexp would take a hundred.
    width, dropped = jnp.finfo(array.dtype).bits, jnp.finfo(array.dtype).nmant - jnp.finfo(dtype).nmant
    pattern = jnp.uint32 if width == 32 else jnp.uint64
    offset = (phase.astype(pattern) << (width - 32)) >> (width - dropped)
    rounded = (((array.view(pattern) + offset) >> dropped) << dropped).view(array.dtype)
    if has_smaller_range(dtype, array.dtype):
        # The subnormal numbers of `dtype` are multiples of its smallest one, so that more digits are dropped.
        unit = jnp.asarray(jnp.finfo(dtype).smallest_subnormal, array.dtype)
        digits = jnp.floor(jnp.abs(array) / unit + offset.astype(array.dtype) / 2**dropped)
        is_normal = jnp.abs(array) >= jnp.asarray(jnp.finfo(dtype).tiny, array.dtype)
        rounded = jnp.where(is_normal, rounded, jnp.sign(array) * digits * unit)
    # The sum would turn a NaN with all bits set, such as NVIDIA's, into zero.
    return jnp.where(jnp.isfinite(array), rounded, array).astype(dtype)


@_round_dithered.defjvp
def _round_dithered_jvp(dtype: jnp.dtype, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    array, count = primals
    # Bits have no derivative. The rounded value follows the array on average, and so does its derivative.
    return _round_dithered(array, dtype, count), tangents[0].astype(dtype)

"""Rounding to a dtype of fewer bits: within its range, and without error on average. Exact powers of two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.numerics.dtypes import has_smaller_range

# 2³² divided by the golden ratio: consecutive multiples, modulo 2³², are spread as evenly as a sequence can be.
_GOLDEN_STRIDE = 0x9E3779B9


def exponent_of(number: jax.Array) -> jax.Array:
    """Returns e with 2ᵉ ≤ x < 2ᵉ⁺¹, an int32, for x ≥ 0 rounded to float32; zero where x is zero or subnormal.

    It reads the bits, because `jnp.frexp` and `jnp.ldexp` would take a tenth of an optimizer's whole program.
    """
    bits = jax.lax.bitcast_convert_type(number.astype(jnp.float32), jnp.int32) >> 23
    return jnp.where(bits > 0, bits - 127, 0)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2ᵉ as float32, for an int32 e between −126 and 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


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

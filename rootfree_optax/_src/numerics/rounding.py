"""Rounding to a narrower dtype: within its range, and right on average; exact powers of two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.numerics.dtypes import is_narrower

# 2³² divided by the golden ratio: consecutive multiples, modulo 2³², spread as evenly as any sequence can.
_GOLDEN_STRIDE = 0x9E3779B9


def exponent_of(number: jax.Array) -> jax.Array:
    """Returns e with 2ᵉ ≤ x < 2ᵉ⁺¹ for x ≥ 0 as float32 holds it, an int32; zero where x is zero or subnormal.

    Read off the bits: `jnp.frexp` and `jnp.ldexp` would make a tenth of the program of a whole optimizer.
    """
    bits = jax.lax.bitcast_convert_type(number.astype(jnp.float32), jnp.int32) >> 23
    return jnp.where(bits > 0, bits - 127, 0)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2ᵉ as float32, e an int32 between −126 and 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def within_range(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns a real `array`, entries beyond its own range or that of `dtype` at the range's end."""
    limit = jnp.asarray(min(float(jnp.finfo(kind).max) for kind in (dtype, array.dtype)), array.dtype)
    return jax.lax.clamp(-limit, array, limit)


def saturate(array: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns `array` in another dtype, real entries beyond the range of either at the range's end."""
    return array.astype(dtype) if jnp.iscomplexobj(array) else within_range(array, dtype).astype(dtype)


def round_dithered(array: jax.Array, dtype: DTypeLike, count: jax.Array) -> jax.Array:
    """Rounds to a narrower dtype so that the error averages to zero over consecutive steps.

    Rounding to nearest stalls a slow moving average in half precision: bfloat16 resolves relative changes of 2⁻⁸,
    and 1 − decay is often less. Adding an offset between zero and one unit in the last place to the magnitude and then
    rounding it down is right on average. The offsets are a fixed equidistributed sequence of the step count, the same
    for all entries: nothing is random, and equal steps give equal bits.

    Args:
      array: real array, any shape.
      dtype: a real floating-point dtype. Nothing is added where it is no narrower than `array`'s.
      count: the step's number, a scalar integer.

    Returns:
      The rounded array, of `dtype`, with the derivatives of `array`.
    """
    if jnp.finfo(dtype).bits >= jnp.finfo(array.dtype).bits:
        return array.astype(dtype)
    return _dithered(array, jnp.dtype(dtype), count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _dithered(array: jax.Array, dtype: jnp.dtype, count: jax.Array) -> jax.Array:
    phase = count.astype(jnp.uint32) * jnp.uint32(_GOLDEN_STRIDE)
    # On the bits: adding to the digits that will be dropped carries into those that stay, and costs two integer
    # operations where frexp and ldexp cost a hundred.
    width, dropped = jnp.finfo(array.dtype).bits, jnp.finfo(array.dtype).nmant - jnp.finfo(dtype).nmant
    pattern = jnp.uint32 if width == 32 else jnp.uint64
    offset = (phase.astype(pattern) << (width - 32)) >> (width - dropped)
    kept = (((array.view(pattern) + offset) >> dropped) << dropped).view(array.dtype)
    if is_narrower(dtype, array.dtype):
        # Below its normal numbers, those of `dtype` are as far apart as its smallest is from zero: more digits go.
        unit = jnp.asarray(jnp.finfo(dtype).smallest_subnormal, array.dtype)
        digits = jnp.floor(jnp.abs(array) / unit + offset.astype(array.dtype) / 2**dropped)
        is_normal = jnp.abs(array) >= jnp.asarray(jnp.finfo(dtype).tiny, array.dtype)
        kept = jnp.where(is_normal, kept, jnp.sign(array) * digits * unit)
    # A NaN of which all bits are set, as NVIDIA's are, would become a zero.
    return jnp.where(jnp.isfinite(array), kept, array).astype(dtype)


@_dithered.defjvp
def _dithered_jvp(dtype: jnp.dtype, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    array, count = primals
    # The bits have no derivative. What is rounded follows the array on average, and so do derivatives.
    return _dithered(array, dtype, count), tangents[0].astype(dtype)

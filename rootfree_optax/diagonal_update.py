"""The mathematics of the root-free diagonal methods, for one array: no trees, no flags, no schedules.

The accumulator s is a diagonal estimate of the curvature of a loss that is a mean over B terms. B·g² estimates the
diagonal of the mean loss's Fisher matrix, s averages it, and g / (s + λ) is the Newton-like step. Every function
computes in at least float32, whatever the dtypes it is given, and returns the dtype of what it updates.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

# 2³² divided by the golden ratio: consecutive multiples, modulo 2³², spread as evenly as any sequence can.
_GOLDEN_STRIDE = 0x9E3779B9


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the real part of an inexact dtype."""
    return jnp.dtype(jnp.finfo(dtype).dtype)


def compute_dtype(array: jax.Array) -> jnp.dtype:
    """Returns the real dtype in which to compute with `array`: float64 for double precision, float32 otherwise."""
    return jnp.dtype(jnp.float64 if jnp.finfo(array.dtype).bits > 32 else jnp.float32)


def dtype_like(array: jax.Array, real: DTypeLike | None) -> jnp.dtype:
    """Returns the dtype for state that is real or complex as `array` is, at the precision of `real` (None: its own)."""
    if real is None:
        return array.dtype
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        # There is no complex dtype below single precision.
        return jnp.dtype(jnp.complex128 if jnp.finfo(real).bits > 32 else jnp.complex64)
    return jnp.dtype(real)


def upcast(array: jax.Array) -> jax.Array:
    """Returns a real or complex `array` in at least single precision."""
    return array.astype(dtype_like(array, compute_dtype(array)))


def squared_magnitude(array: jax.Array) -> jax.Array:
    """Returns |a|² of a real or complex array, as a real array."""
    if jnp.iscomplexobj(array):
        return jnp.square(array.real) + jnp.square(array.imag)
    return jnp.square(array)


def round_dithered(array: jax.Array, dtype: DTypeLike, count: jax.Array) -> jax.Array:
    """Rounds to a narrower dtype so that the error averages to zero over consecutive steps.

    Rounding to nearest stalls a slow moving average in half precision: bfloat16 resolves relative changes of 2⁻⁸,
    and 1 − decay is often less. Rounding down after adding an offset between zero and one unit in the last place is
    right on average. The offsets are a fixed equidistributed sequence of the step count, the same for all entries:
    nothing is random, and equal steps give equal bits.

    Args:
      array: real array, any shape.
      dtype: a real floating-point dtype. Nothing is added where it is no narrower than `array`'s.
      count: the step's number, a scalar integer.

    Returns:
      The rounded array, of `dtype`.
    """
    if jnp.finfo(dtype).bits >= jnp.finfo(array.dtype).bits:
        return array.astype(dtype)
    phase = count.astype(jnp.uint32) * jnp.uint32(_GOLDEN_STRIDE)
    digits = jnp.finfo(dtype).nmant + 1
    # Only as many bits as the sum below holds exactly: rounded up to one, the offset would move even a zero.
    bits = min(32, jnp.finfo(array.dtype).nmant + 1 - digits)
    offset = (phase >> (32 - bits)).astype(array.dtype) * 2.0**-bits
    mantissa, exponent = jnp.frexp(array)
    rounded = jnp.floor(jnp.ldexp(mantissa, digits) + offset)
    return jnp.ldexp(rounded, exponent - digits).astype(dtype)


def moving_average(average: jax.Array, value: jax.Array, decay: ArrayLike) -> jax.Array:
    """Returns decay·average + (1 − decay)·value, for arrays of one dtype.

    1 − decay is taken before `decay` is rounded to that dtype: 1 − 0.999 would lose four digits in float32.
    """
    real = compute_dtype(average)
    return jnp.asarray(decay, real) * average + jnp.asarray(1 - decay, real) * value


def second_moment(
    s: jax.Array, curvature: jax.Array, *, decay: ArrayLike, batch_size: ArrayLike, count: jax.Array
) -> jax.Array:
    """Returns s ← decay·s + (1 − decay)·B·|c|², entries that would come out non-finite left as they were.

    Args:
      s: the accumulator, real, any shape.
      curvature: c, the gradient or another vector of which B·|c|² estimates the curvature; real or complex, of s's
        shape. With one more, leading axis, the mean of |c|² over that axis is taken.
      decay: in [0, 1).
      batch_size: B, positive.
      count: the step's number, for the dithered rounding of a half-precision accumulator.
    """
    square = squared_magnitude(upcast(curvature))
    if square.ndim > s.ndim:
        square = jnp.mean(square, axis=0)
    wide = upcast(s)
    square = jnp.asarray(batch_size, wide.dtype) * square.astype(wide.dtype)
    new = round_dithered(moving_average(wide, square, decay), s.dtype, count)
    return jnp.where(jnp.isfinite(new), new, s)


def first_moment(m: jax.Array, gradient: jax.Array, *, decay: ArrayLike) -> jax.Array:
    """Returns m ← decay·m + (1 − decay)·g, entries that would come out non-finite left as they were."""
    wide = upcast(m)
    new = moving_average(wide, gradient.astype(wide.dtype), decay).astype(m.dtype)
    return jnp.where(jnp.isfinite(new), new, m)


def root_free_direction(gradient: jax.Array, s: jax.Array, *, damping: ArrayLike) -> jax.Array:
    """Returns g / (s + λ), of g's dtype. A non-finite entry of g stays non-finite."""
    wide = upcast(gradient)
    real = compute_dtype(gradient)
    return (wide / (s.astype(real) + jnp.asarray(damping, real))).astype(gradient.dtype)


def averaged_direction(
    gradient: jax.Array,
    m: jax.Array,
    s: jax.Array,
    *,
    damping: ArrayLike,
    m_weight: ArrayLike = 1.0,
    s_weight: ArrayLike = 1.0,
) -> jax.Array:
    """Returns (m / m_weight) / (s / s_weight + λ), of g's dtype. A non-finite entry of g is shown in its place."""
    wide = upcast(gradient)
    real = compute_dtype(gradient)
    average = m.astype(wide.dtype) / jnp.asarray(m_weight, real)
    curvature = s.astype(real) / jnp.asarray(s_weight, real)
    direction = root_free_direction(average, curvature, damping=damping)
    return jnp.where(jnp.isfinite(gradient), direction.astype(gradient.dtype), gradient)


def total_weight(decay: ArrayLike, count: jax.Array) -> jax.Array:
    """Returns 1 − decay^count, what the weights of a moving average from zero add up to after `count` ≥ 1 steps.

    Computed as −expm1(count·log1p(−(1 − decay))), because 1 − decay^count cancels for decay near 1.
    """
    rate = jnp.log1p(-jnp.asarray(1 - decay, jnp.float32))
    return -jnp.expm1(count.astype(jnp.float32) * rate)

"""The root-free diagonal methods, for one array: no trees, no schedules.

The accumulator s is a diagonal estimate of the curvature of a loss that is a mean over B terms. B·g² estimates the
diagonal of the mean loss's Fisher matrix, s averages it, and g / (s + λ) is the Newton-like step. Every function
computes in at least float32, whatever the dtypes it is given, and returns the dtype of what it updates.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.momentum import keep_finite
from rootfree_optax._src.numerics.arithmetic import accumulation_dtype, round_dithered, upcast

_LARGEST_SQUARED = 2.0**50
_LEAST_ROOT = 2.0**-60
# The longest entry of a step along an average of gradients, and along one gradient, which is about four times as long
# where it is a surprise. In 120 steps of a decoder and 40 of a convolutional network the longest of RF-AdamW was at
# most 1.8 times AdamW's longest, which is about one.
LONGEST_OF_AVERAGES, LONGEST_OF_GRADIENTS = 2.5, 10.0


def squared_magnitude(array: jax.Array) -> jax.Array:
    """Returns |a|² of a real or complex array, as a real array."""
    if jnp.iscomplexobj(array):
        return jnp.square(array.real) + jnp.square(array.imag)
    return jnp.square(array)


def moving_average(average: jax.Array, value: jax.Array, decay: ArrayLike) -> jax.Array:
    """Returns decay·average + (1 − decay)·value, for arrays of one dtype.

    1 − decay is taken before `decay` is rounded to that dtype: 1 − 0.999 would lose four digits in float32.
    """
    return jnp.asarray(decay, average.dtype) * average + jnp.asarray(1 - decay, average.dtype) * value


def second_moment(
    s: jax.Array, curvature: jax.Array, *, decay: ArrayLike, batch_size: ArrayLike, count: jax.Array
) -> jax.Array:
    """Returns s ← decay·s + (1 − decay)·B·|c|²; entries whose c is not finite stay as they were.

    What is beyond the range counts as the largest number.

    Args:
      s: the accumulator, real, any shape.
      curvature: c, the gradient or another vector of which B·|c|² estimates the curvature; real or complex, of s's
        shape. With one more, leading axis, the mean of |c|² over that axis is taken.
      decay: in [0, 1).
      batch_size: B, positive.
      count: the step's number, for the dithered rounding of a half-precision accumulator.
    """
    square = _mean_square(curvature, s)
    average = moving_average(upcast(s), jnp.asarray(batch_size, square.dtype) * square, decay)
    is_finite = jnp.isfinite(curvature)
    is_finite = jnp.all(is_finite, axis=0) if curvature.ndim > s.ndim else is_finite
    average = jnp.where(is_finite, jnp.minimum(average, jnp.asarray(jnp.finfo(s.dtype).max, average.dtype)), jnp.nan)
    return _round_finite(average, s, count)


def _mean_square(curvature: jax.Array, s: jax.Array) -> jax.Array:
    """Returns |c|², or its mean over samples, in the dtype that averages of s's dtype are computed in."""
    square = squared_magnitude(upcast(curvature))
    return (jnp.mean(square, axis=0) if square.ndim > s.ndim else square).astype(accumulation_dtype(s.dtype))


def _round_finite(average: jax.Array, s: jax.Array, count: jax.Array) -> jax.Array:
    """Returns an average in the dtype of the old one, s; entries that would come out non-finite stay as in s."""
    # Decided before rounding: a test of the rounded value would cost a half-precision s one more pass over memory.
    fits = average <= jnp.asarray(jnp.finfo(s.dtype).max, average.dtype)
    return round_dithered(jnp.where(fits, average, upcast(s)), s.dtype, count)


def first_moment(m: jax.Array, gradient: jax.Array, *, decay: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns decay·m + (1 − decay)·g in at least single precision, and the new m: see `keep_finite`."""
    return keep_finite(m, moving_average(upcast(m), gradient.astype(upcast(m).dtype), decay), gradient)


def root_free_direction(gradient: jax.Array, s: jax.Array, *, damping: ArrayLike) -> jax.Array:
    """Returns g / (s + λ), of g's dtype; zero over zero is zero. A non-finite entry of g stays non-finite."""
    wide = upcast(gradient)
    real = accumulation_dtype(gradient.dtype)
    curvature = s.astype(real) + jnp.asarray(damping, real)
    return _divide(wide, curvature).astype(gradient.dtype)


def averaged_direction(
    gradient: jax.Array,
    m: jax.Array,
    s: jax.Array,
    *,
    damping: ArrayLike,
    m_weight: ArrayLike = 1.0,
    s_weight: ArrayLike = 1.0,
) -> jax.Array:
    """Returns (m / m_weight) / (s / s_weight + λ), of g's dtype. A non-finite entry of m stays non-finite."""
    wide = upcast(gradient)
    real = accumulation_dtype(gradient.dtype)
    average = m.astype(wide.dtype) / jnp.asarray(m_weight, wide.dtype)
    curvature = s.astype(real) / jnp.asarray(s_weight, real)
    return root_free_direction(average, curvature, damping=damping).astype(gradient.dtype)


def limit_to_squares(gradient: jax.Array) -> jax.Array:
    """Returns a gradient whose squares can be averaged in float32: finite entries are at most 2⁵⁰ in magnitude.

    Otherwise an average of squares would miss a larger entry, which the average of gradients would have.
    """
    gradient = jnp.asarray(gradient)
    wide = upcast(gradient)
    if not jnp.iscomplexobj(wide):
        # Without a division, so that compilers repeat it where it is read rather than keep a copy of the gradient.
        limit = jnp.asarray(_LARGEST_SQUARED, wide.dtype)
        return jnp.where(jnp.isfinite(wide), jax.lax.clamp(-limit, wide, limit), wide).astype(gradient.dtype)
    size = jnp.abs(wide)
    is_large = (size > _LARGEST_SQUARED) & jnp.isfinite(size)
    factor = jnp.where(is_large, _LARGEST_SQUARED / jnp.where(is_large, size, 1), 1)
    return (wide * factor.astype(wide.dtype)).astype(gradient.dtype)


def average_square(s: jax.Array, curvature: jax.Array, *, weight: ArrayLike, count: jax.Array) -> jax.Array:
    """Returns s ← s + w·(|c|² − s), an average that starts right and keeps the entries whose c is zero.

    All steps weigh alike, w = 1/t, until there are 1/weight of them, and the first |c|² of an entry sets it. Zero
    is no evidence of flatness: a row of an embedding that a mini-batch does not touch has a gradient of zero, too. An
    entry that would come out non-finite stays as it was.

    Args:
      s: the accumulator, real, any shape; zero where nothing was seen.
      curvature: c, real or complex, of s's shape, or with one more, leading axis to take the mean over.
      weight: the least w, in (0, 1].
      count: t, how many steps there have been, this one included, a scalar; it dithers the rounding of a half-precision
        accumulator, too.
    """
    wide, square = upcast(s), _mean_square(curvature, s)
    weight = jnp.maximum(jnp.asarray(weight, wide.dtype), 1 / count.astype(wide.dtype))
    average = jnp.where(wide == 0, square, wide + weight * (square - wide))
    return _round_finite(jnp.where(square > 0, average, wide), s, count)


def damp_relatively(s: jax.Array, *, damping: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns s / mean(s) + ρ, in at least single precision, and mean(s); one and zero where s is all zero."""
    wide = upcast(s)
    mean = jnp.mean(wide)
    is_zero = mean == 0
    relative = wide / jnp.where(is_zero, 1, mean) + jnp.asarray(damping, wide.dtype)
    return jnp.where(is_zero, 1, relative), mean


def root_free_step(
    m: jax.Array, s: jax.Array, *, damping: ArrayLike, longest: ArrayLike = LONGEST_OF_AVERAGES
) -> jax.Array:
    """Returns D = m / (s + ρ·mean(s)), as long as Adam's m / √s: both have one root mean square.

    It is shorter where that would make an entry longer than `longest`: a few entries beside many that are smaller by
    far, but not zero, have almost all of D's length, and hardly any of Adam's. An entry of zero over zero is zero.

    Args:
      m: an average of gradients, real or complex, in at least single precision.
      s: an average of their squares, of m's shape.
      damping: ρ ≥ 0, relative to the mean of s.
      longest: what an entry of D may be.
    """
    # In units in which mean(s) is one, and with no entry above 2⁶⁰: m / s itself, or its square, may leave the range.
    # An entry whose squares have all vanished counts for nothing in the length, whatever is left of it in m.
    relative, mean = damp_relatively(s, damping=damping)
    own_root = jnp.sqrt(upcast(s)).astype(jnp.abs(m).dtype)
    adam = m / jnp.where(own_root == 0, 1, jnp.maximum(own_root, _LEAST_ROOT * jnp.abs(m))).astype(m.dtype)
    root = jnp.sqrt(upcast(s) / jnp.where(mean == 0, 1, mean))
    direction = _divide(adam * root.astype(adam.dtype), jnp.maximum(relative, _LEAST_ROOT**2))
    rms = lambda array: jnp.sqrt(jnp.mean(squared_magnitude(array)))
    size, largest = rms(direction), jnp.max(jnp.abs(direction), initial=0)
    scale = jnp.minimum(rms(adam) / jnp.where(size == 0, 1, size), longest / jnp.where(largest == 0, 1, largest))
    return direction * scale.astype(direction.dtype)


def newton_step(
    m: jax.Array, s: jax.Array, *, damping: ArrayLike, absolute_damping: ArrayLike, batch_size: ArrayLike
) -> jax.Array:
    """Returns D = m / (B·(s + ρ·mean(s)) + λ); an entry of zero over zero is zero."""
    relative, mean = damp_relatively(s, damping=damping)
    as_scalar = lambda number: jnp.asarray(number, relative.dtype)
    return _divide(m, as_scalar(batch_size) * mean * relative + as_scalar(absolute_damping))


def adam_step(m: jax.Array, v: jax.Array, *, eps: ArrayLike) -> jax.Array:
    """Returns m / max(√v + ε·√mean(v), 2⁻⁶⁰): squares of gradients below that vanish, and m does not."""
    wide = upcast(v)
    root = jnp.sqrt(wide) + jnp.asarray(eps, wide.dtype) * jnp.sqrt(jnp.mean(wide))
    return m / jnp.maximum(root, _LEAST_ROOT).astype(m.dtype)


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Returns the quotient, where the denominator is zero the numerator: zero, or tiny, as its square has vanished."""
    safe = jnp.where(denominator == 0, 1, denominator)
    return numerator / safe.astype(numerator.dtype)

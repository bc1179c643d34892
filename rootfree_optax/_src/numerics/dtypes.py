"""Dtypes: what is computed in, and what is stored."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the real part of an inexact dtype."""
    return jnp.dtype(jnp.finfo(dtype).dtype)


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the real dtype in which to compute with `dtype`: float64 for double precision, float32 otherwise."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits > 32 else jnp.float32)


def is_half(dtype: DTypeLike) -> bool:
    """Returns whether a real floating-point dtype is narrower than the one that is computed in."""
    return bool(jnp.finfo(dtype).bits < jnp.finfo(accumulation_dtype(dtype)).bits)


def is_narrower(dtype: DTypeLike, other: DTypeLike) -> bool:
    """Returns whether a floating-point dtype has a narrower range than another, as float16 has."""
    return bool(jnp.finfo(dtype).maxexp < jnp.finfo(other).maxexp)


def dtype_like(array: jax.Array, real: DTypeLike | None) -> jnp.dtype:
    """Returns the dtype for state that is real or complex as `array` is, at the precision of `real` (None: its own)."""
    own = jnp.result_type(array)  # of a Python number, too
    if real is None:
        return own
    if jnp.issubdtype(own, jnp.complexfloating):
        # There is no complex dtype below single precision.
        return jnp.dtype(jnp.complex128 if jnp.finfo(real).bits > 32 else jnp.complex64)
    return jnp.dtype(real)


def upcast(array: jax.Array) -> jax.Array:
    """Returns a real or complex `array` in at least single precision."""
    return array.astype(dtype_like(array, accumulation_dtype(array.dtype)))

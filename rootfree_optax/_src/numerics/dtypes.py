"""The dtypes to compute in and to store."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


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

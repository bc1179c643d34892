"""What is checked of hyperparameters, at construction.

Only Python numbers are checked. A traced array has no value yet and a schedule has none before its step, so neither is
ever looked at by Python: no branch depends on a traced value. A Python zero or one may leave work out of the program.
"""

import numbers
from collections.abc import Collection
from typing import Any, TypeGuard

import jax.numpy as jnp


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real)


def is_zero(value: Any) -> bool:
    """Returns whether `value` is a Python number equal to zero, which turns a feature off at construction."""
    return _is_number(value) and value == 0


def require_constant(**hyperparameters: Any) -> None:
    """Raises a TypeError for a schedule among what may be a number or a traced scalar only."""
    for name, value in hyperparameters.items():
        if callable(value):
            raise TypeError(
                f"{name} must be a number or a traced scalar, got the callable {value!r}. To change it from step to "
                "step, wrap the optimizer in optax.inject_hyperparams."
            )


def require_interval(name: str, value: Any) -> None:
    """Raises a ValueError if `value` is a Python number that is not a whole one of at least 1."""
    if _is_number(value) and not (value >= 1 and float(value).is_integer()):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}.")


def require_at_least(name: str, value: Any, minimum: float) -> None:
    """Raises a ValueError if `value` is a Python number below `minimum` (or NaN); arrays and schedules pass."""
    if _is_number(value) and not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def require_below_one(name: str, value: Any) -> None:
    """Raises a ValueError if `value` is a Python number outside (0, 1); arrays and schedules pass."""
    if _is_number(value) and not 0 < value < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {value}.")


def require_at_most(name: str, value: Any, maximum: float) -> None:
    """Raises a ValueError if `value` is a Python number above `maximum`; arrays and schedules pass."""
    if _is_number(value) and not value <= maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}.")


def require_positive(name: str, value: Any) -> None:
    """Raises a ValueError if `value` is a Python number that is not positive; arrays and schedules pass."""
    if _is_number(value) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises a ValueError if `value` is none of the named choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_fraction(name: str, value: Any) -> None:
    """Raises a ValueError if `value` is a Python number outside [0, 1); arrays and schedules pass."""
    if _is_number(value) and not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}.")


def require_floating_dtype(name: str, dtype: Any) -> None:
    """Raises a ValueError if `dtype` is neither None nor a real floating-point dtype of two bytes at least."""
    if dtype is not None and not (jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1):
        raise ValueError(
            f"{name} must be None or a real floating-point dtype of 16 bits at least, got {jnp.dtype(dtype).name}."
        )

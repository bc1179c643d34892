"""What is checked of hyperparameters, at construction.

What a value is, is checked always; how large it is, where that is known. A tracer has no value yet and a schedule has
none before its step, so no branch depends on either. A known zero or one may leave work out of the program.
"""

import contextlib
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Range(NamedTuple):
    """Which numbers a hyperparameter may be, and how an error says so."""

    text: str
    contains: Callable[[float], bool]


NON_NEGATIVE = Range("a finite number of at least 0", lambda x: 0 <= x < math.inf)
LEARNING_RATE = Range(f"{NON_NEGATIVE.text} (to ascend, negate the gradients)", NON_NEGATIVE.contains)
POSITIVE = Range("a finite positive number", lambda x: 0 < x < math.inf)
FRACTION = Range("in [0, 1)", lambda x: 0 <= x < 1)
BELOW_ONE = Range("in (0, 1)", lambda x: 0 < x < 1)
AT_MOST_ONE = Range("in [0, 1]", lambda x: 0 <= x <= 1)
_WHOLE = Range("a whole number of at least 1 and below 2³¹", lambda x: 1 <= x < 2**31 and x == int(x))


def is_zero(value: Any) -> bool:
    """Returns whether `value` is the number zero, which turns a feature off at construction; an array never does."""
    return isinstance(value, int | float | np.generic) and value == 0


def kind_of(value: Any) -> str | None:
    """Returns what a state depends on where a number may change in training, but not be left out or added."""
    return None if value is None else "a number"


def require_scalar(name: str, value: Any) -> None:
    """Raises a TypeError for anything but a real number: of Python or NumPy, or an array or tracer without axes."""
    is_array = isinstance(value, np.generic | np.ndarray | jax.Array)
    if is_array and np.shape(value) == () and any(jnp.issubdtype(value.dtype, k) for k in (jnp.floating, jnp.integer)):
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        return
    hint = "Pass a Python number, or an array without axes."
    if isinstance(value, str):
        hint = "Pass a number or a schedule, such as optax.cosine_decay_schedule(1e-3, 1000)."
        with contextlib.suppress(ValueError):
            hint = f"Convert it: {float(value)!r} without quotes. YAML reads 1e-3 as a string, and 1.0e-3 as a number."
    raise TypeError(f"{name} must be a real number, got {value!r}. {hint}")


def require_number(name: str, value: Any, allowed: Range, *, schedule: bool = True, optional: bool = False) -> None:
    """Checks one hyperparameter.

    Args:
      name: of the hyperparameter.
      value: a number, a traced scalar or a schedule.
      allowed: what its value may be.
      schedule: whether it may be a schedule.
      optional: whether it may be None.

    Raises:
      ValueError: for a known value that is not allowed.
      TypeError: for anything else: strings, Booleans, complex numbers, arrays with axes.
    """
    if (value is None and optional) or (callable(value) and schedule):
        return
    if callable(value):
        raise TypeError(
            f"{name} must be a number or a traced scalar, got the callable {value!r}. To change it from step to "
            "step, wrap the optimizer in optax.inject_hyperparams."
        )
    require_scalar(name, value)
    if not isinstance(value, jax.core.Tracer) and not allowed.contains(float(value)):
        raise ValueError(f"{name} must be {allowed.text}, got {value}.")


def require_interval(name: str, value: Any, *, optional: bool = False) -> None:
    """Checks after how many steps something is done: a number, a callable, or a Boolean array, its value."""
    is_flag = isinstance(value, jax.Array) and value.dtype == jnp.bool_ and value.ndim == 0
    if not (is_flag or callable(value)):
        require_number(name, value, _WHOLE, optional=optional)


def whole_number(name: str, value: Any) -> int:
    """Returns what decides shapes in a program, an integer of Python or NumPy of at least 1, as a Python int."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    number = int(value) if is_integer else 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, as a Python int, got {value!r}.")
    return number


def require_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises a ValueError if `value` is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_floating_dtype(name: str, dtype: Any) -> None:
    """Raises a ValueError if `dtype` is neither None nor a real floating-point dtype of two bytes at least."""
    is_floating, found = dtype is None, repr(dtype)
    with contextlib.suppress(TypeError):
        found = found if is_floating else jnp.dtype(dtype).name
        is_floating = is_floating or (jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1)
    if not is_floating:
        raise ValueError(f"{name} must be None or a real floating-point dtype of 16 bits at least, got {found}.")

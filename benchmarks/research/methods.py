"""The ranges in which optimizers are tuned, and the methods of train_digits.py with theirs."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from digits.methods import METHODS as DIGITS_METHODS
from digits.methods import Method as DigitsMethod
from searching import Method, Range

MOMENTUM = Range(0.01, 0.9, of_one_minus=True)
DECAY = Range(1e-3, 0.3, of_one_minus=True)
DAMPING = Range(1e-8, 5e-4)
DECOUPLED_DECAY = Range(1e-3, 1)  # multiplied by the learning rate alone
COUPLED_DECAY = Range(1e-4, 1e-1)  # goes through the momentum, too

RANGES = {  # AdamW's, and those of all that take over its settings
    "learning_rate": Range(3e-4, 1e-1),
    "b1": MOMENTUM,
    "b2": DECAY,
    "decay": DECAY,
    "momentum": MOMENTUM,
    "eps": Range(1e-10, 1e-6),
    "weight_decay": DECOUPLED_DECAY,
}
ADAMW = {name: RANGES[name] for name in ("learning_rate", "weight_decay")}
PUBLISHED = {
    "learning_rate": Range(1e-4, 1e-1),
    "preconditioner_lr": Range(1e-2, 5e-1),
    "damping": DAMPING,
    "momentum": MOMENTUM,
    "weight_decay": COUPLED_DECAY,
}
SGD = {"learning_rate": Range(3e-3, 1), "momentum": MOMENTUM, "weight_decay": COUPLED_DECAY}

RF_RMSPROP = {
    "learning_rate": Range(3e-4, 1e-1),
    "decay": DECAY,
    "damping": DAMPING,
    "momentum": MOMENTUM,
    "weight_decay": COUPLED_DECAY,
}
RF_ADAMW = {
    "learning_rate": Range(1e-3, 3e-1),
    "b1": MOMENTUM,
    "b2": DECAY,
    "damping": DAMPING,
    "weight_decay": DECOUPLED_DECAY,
}


def without_batch_size(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """Returns an optimizer that is told how many terms the loss averages, and does not ask."""
    return lambda learning_rate, batch_size, **others: make(learning_rate, **others)


_PUBLISHED = {
    "published_rf_rmsprop": RF_RMSPROP,
    "published_rf_adamw": RF_ADAMW,
    "published_sirf_shampoo": PUBLISHED,
}


def _of_digits(name: str, method: DigitsMethod) -> Method:
    if name in _PUBLISHED:
        fixed = {key: value for key, value in method.settings.items() if key == "layout"}
        return Method(method.label, functools.partial(method.build, **fixed), _PUBLISHED[name])
    ranges = SGD if name == "sgd" else {key: RANGES[key] for key in method.settings}
    return Method(method.label, without_batch_size(method.build), ranges)


METHODS = {name: _of_digits(name, method) for name, method in DIGITS_METHODS.items()}

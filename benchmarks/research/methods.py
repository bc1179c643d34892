"""The ranges in which optimizers are tuned, and those that train_digits.py compares, tuned by tune_digits.py."""

from digits.methods import METHODS as DIGITS_METHODS
from searching import Method, Range

MOMENTUM = Range(0.01, 0.9, of_one_minus=True)
DECAY = Range(1e-3, 0.3, of_one_minus=True)
DAMPING = Range(1e-8, 5e-4)
DECOUPLED_DECAY = Range(1e-3, 1)  # multiplied by the learning rate alone
COUPLED_DECAY = Range(1e-4, 1e-1)  # goes through the momentum, too

KRONECKER = {
    "learning_rate": Range(1e-4, 1e-1),
    "preconditioner_lr": Range(1e-2, 5e-1),
    "damping": DAMPING,
    "momentum": MOMENTUM,
    "weight_decay": COUPLED_DECAY,
}
RANGES: dict[str, dict[str, Range]] = {
    "rf_rmsprop": {
        "learning_rate": Range(3e-4, 1e-1),
        "decay": DECAY,
        "damping": DAMPING,
        "momentum": MOMENTUM,
        "weight_decay": COUPLED_DECAY,
    },
    "rf_adamw": {
        "learning_rate": Range(1e-3, 3e-1),
        "b1": MOMENTUM,
        "b2": DECAY,
        "damping": DAMPING,
        "weight_decay": DECOUPLED_DECAY,
    },
    "sirf_shampoo": KRONECKER,
    "sirf_published": KRONECKER,
    "adamw": {
        "learning_rate": Range(3e-4, 1e-1),
        "b1": MOMENTUM,
        "b2": DECAY,
        "eps": Range(1e-10, 1e-6),
        "weight_decay": DECOUPLED_DECAY,
    },
    "sgd": {"learning_rate": Range(3e-3, 1), "momentum": MOMENTUM, "weight_decay": COUPLED_DECAY},
}
METHODS = {name: Method(method.label, method.build, RANGES[name]) for name, method in DIGITS_METHODS.items()}

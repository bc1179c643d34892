"""The ranges in which optimizers are tuned, and the methods of train_digits.py with theirs."""

from digits.methods import METHODS as DIGITS_METHODS
from searching import Method, Range

MOMENTUM = Range(0.01, 0.9, of_one_minus=True)
DECAY = Range(1e-3, 0.3, of_one_minus=True)
DAMPING = Range(1e-8, 5e-4)
DECOUPLED_DECAY = Range(1e-3, 1)  # multiplied by the learning rate alone
COUPLED_DECAY = Range(1e-4, 1e-1)  # goes through the momentum, too

ADAMW = {"learning_rate": Range(3e-4, 1e-1), "weight_decay": DECOUPLED_DECAY}  # and of all that take over its settings
PUBLISHED = {
    "learning_rate": Range(1e-4, 1e-1),
    "preconditioner_lr": Range(1e-2, 5e-1),
    "damping": DAMPING,
    "momentum": MOMENTUM,
    "weight_decay": COUPLED_DECAY,
}
SGD = {"learning_rate": Range(3e-3, 1), "momentum": MOMENTUM, "weight_decay": COUPLED_DECAY}

_OTHERS = {"sgd": SGD, "published": PUBLISHED}
METHODS = {
    name: Method(method.label, method.build, _OTHERS.get(name, ADAMW)) for name, method in DIGITS_METHODS.items()
}

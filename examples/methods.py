"""The optimizers that the examples compare, the ranges they are tuned in, and where tuned settings are kept.

Another optimizer joins by one entry in `METHODS` and one run of tune_digits.py.
"""

import functools
import json
import pathlib
from typing import Any

import optax
from jax.typing import ArrayLike
from searching import Method, Range, adamw

import rootfree_optax as rf

RESULTS = pathlib.Path(__file__).parent / "results"


def sgd(
    learning_rate: optax.Schedule, batch_size: ArrayLike, momentum: ArrayLike, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    """Returns stochastic gradient descent with heavy-ball momentum and weight decay."""
    del batch_size
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))


def sirf_published(learning_rate: optax.ScalarOrSchedule, **others: Any) -> optax.GradientTransformation:
    """Returns SIRF-Shampoo as published: a first-order refresh, with momentum of the factors and of the directions."""
    published = {"refresh": "published", "initial_scale": 1.0, "riemannian_momentum": 0.5}
    return rf.sirf_shampoo(learning_rate, **published, momentum_of="directions", nesterov=False, **others)


def sirf_exact(
    learning_rate: optax.Schedule,
    batch_size: int,
    preconditioner_lr: ArrayLike,
    update_every: int,
    maximum: float = 0.2,
    **others: Any,
) -> optax.GradientTransformation:
    """Returns SIRF-Shampoo with its averaging schedule, for a `preconditioner_lr` that may be traced."""
    return rf.sirf_shampoo(
        learning_rate,
        preconditioner_lr=rf.averaging_schedule(preconditioner_lr, update_every, maximum=maximum),
        batch_size=batch_size,
        update_every=update_every,
        **others,
    )


# Convolution kernels become matrices, as in a network of patches: (3·3·inputs, outputs).
LAYOUT = rf.Layout(merge_dims=288)

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

METHODS: dict[str, Method] = {
    "rf_rmsprop": Method(
        "RF-RMSProp",
        rf.rf_rmsprop,
        {
            "learning_rate": Range(3e-4, 1e-1),
            "decay": DECAY,
            "damping": DAMPING,
            "momentum": MOMENTUM,
            "weight_decay": COUPLED_DECAY,
        },
    ),
    "rf_adamw": Method(
        "RF-AdamW",
        rf.rf_adamw,
        {
            "learning_rate": Range(1e-3, 3e-1),
            "b1": MOMENTUM,
            "b2": DECAY,
            "damping": DAMPING,
            "weight_decay": DECOUPLED_DECAY,
        },
    ),
    "sirf_shampoo": Method("SIRF-Shampoo", functools.partial(sirf_exact, update_every=1, layout=LAYOUT), KRONECKER),
    "sirf_published": Method("SIRF-Shampoo, published", functools.partial(sirf_published, layout=LAYOUT), KRONECKER),
    "adamw": Method(
        "AdamW",
        adamw,
        {
            "learning_rate": Range(3e-4, 1e-1),
            "b1": MOMENTUM,
            "b2": DECAY,
            "eps": Range(1e-10, 1e-6),
            "weight_decay": DECOUPLED_DECAY,
        },
    ),
    "sgd": Method(
        "SGD with momentum",
        sgd,
        {"learning_rate": Range(3e-3, 1), "momentum": MOMENTUM, "weight_decay": COUPLED_DECAY},
    ),
}


def tuned_settings(name: str, directory: pathlib.Path = RESULTS) -> dict[str, float]:
    """Returns the hyperparameters that tune_digits.py chose for one method and wrote to `directory`."""
    path = directory / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write it with: python examples/tune_digits.py --optimizer {name}")
    return json.loads(path.read_text())["chosen"]

"""The optimizers that the characters compare and the ranges they are tuned in: four hyperparameters each.

Another optimizer joins by one entry in `METHODS` and one run of tune_characters.py.
"""

import functools
import pathlib

import optax
from digits.methods import adamw, sirf_exact, sirf_published
from jax.typing import ArrayLike
from searching import Method, Range

import rootfree_optax as rf
from characters.training import SEQUENCE

RECORDS = pathlib.Path("results", "characters")  # of the searches, which are too many to be kept with the code

MOMENTUM = Range(0.05, 0.2, of_one_minus=True)
DECOUPLED_DECAY = Range(1e-3, 1)  # multiplied by the learning rate alone
DAMPING = Range(1e-7, 1e-3)


def muon(
    learning_rate: optax.Schedule, batch_size: ArrayLike, adam_ratio: ArrayLike, **others: ArrayLike
) -> optax.GradientTransformation:
    """Returns Optax's Muon for all matrices; vectors get AdamW with a learning rate of `adam_ratio` times Muon's."""
    del batch_size
    adam = lambda count: adam_ratio * learning_rate(count)
    return optax.contrib.muon(learning_rate, adam_learning_rate=adam, **others)


def rf_rmsprop(learning_rate: optax.Schedule, batch_size: int, **others: ArrayLike) -> optax.GradientTransformation:
    """Returns RF-RMSProp, for which every character is a term of the loss."""
    return rf.rf_rmsprop(learning_rate, batch_size=batch_size * SEQUENCE, **others)


SIRF_PUBLISHED = {
    "learning_rate": Range(3e-5, 3e-3),
    "preconditioner_lr": Range(0.03, 0.8),
    "damping": DAMPING,
    "momentum": MOMENTUM,
}
SIRF_EXACT = SIRF_PUBLISHED | {"preconditioner_lr": Range(0.03, 0.5)}
SIRF_EXACT_PLAIN = SIRF_PUBLISHED | {"preconditioner_lr": Range(0.01, 0.2)}  # larger ones diverge
SIRF_EXACT_T1 = SIRF_PUBLISHED | {"preconditioner_lr": Range(0.003, 0.1)}  # which averages over a few more steps


# With the curvature of every other gradient, a refresh may weigh more than with that of one.
AT_INTERVALS = {"update_every": 10, "curvature_every": 2, "trust_radius": 3.0, "maximum": 0.5}

METHODS: dict[str, Method] = {
    "adamw": Method(
        "AdamW",
        adamw,
        {
            "learning_rate": Range(3e-4, 3e-2),
            "b1": MOMENTUM,
            "b2": Range(1e-3, 0.1, of_one_minus=True),
            "weight_decay": DECOUPLED_DECAY,
        },
    ),
    "muon": Method(
        "Muon",
        muon,
        {
            "learning_rate": Range(2e-3, 2e-1),
            "beta": MOMENTUM,
            "weight_decay": DECOUPLED_DECAY,
            "adam_ratio": Range(0.05, 1),
        },
    ),
    "rf_rmsprop": Method(
        "RF-RMSProp",
        rf_rmsprop,
        {
            "learning_rate": Range(1e-2, 1),
            "decay": Range(1e-3, 0.1, of_one_minus=True),
            "damping": Range(1e-6, 1e-2),
            "momentum": MOMENTUM,
        },
    ),
    "sirf_published": Method("SIRF published, T=1", functools.partial(sirf_published, update_every=1), SIRF_PUBLISHED),
    "sirf_published_t10": Method(
        "SIRF published, T=10", functools.partial(sirf_published, update_every=10), SIRF_PUBLISHED
    ),
    "sirf_exact_plain": Method(
        "SIRF exact, plain",  # a constant β₂, and momentum of the directions
        functools.partial(rf.sirf_shampoo, update_every=10, momentum_of="directions", nesterov=False),
        SIRF_EXACT_PLAIN,
    ),
    "sirf_exact_t1": Method(
        "SIRF exact, T=1", functools.partial(sirf_exact, update_every=1, maximum=0.3), SIRF_EXACT_T1
    ),
    "sirf_exact": Method("SIRF exact, T=10", functools.partial(sirf_exact, **AT_INTERVALS), SIRF_EXACT),
    "sirf_exact_bfloat16": Method(
        "SIRF exact, bfloat16",
        functools.partial(sirf_exact, preconditioner_dtype="bfloat16", **AT_INTERVALS),
        SIRF_EXACT,
    ),
}

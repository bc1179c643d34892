"""The optimizers that the characters compare and the ranges they are tuned in: four hyperparameters each.

Another optimizer joins by one entry in `METHODS` and one run of tune_characters.py.
"""

import functools
import pathlib

import jax
import optax
from jax.typing import ArrayLike
from searching import Method, Range, adamw

import rootfree_optax as rf
from characters.training import SEQUENCE

RESULTS = pathlib.Path(__file__).parent / "results"

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


def muon_hidden(
    learning_rate: optax.Schedule, batch_size: ArrayLike, **others: ArrayLike
) -> optax.GradientTransformation:
    """Returns Muon for the matrices within blocks alone, as its authors use it; the others get AdamW, too."""
    hidden = lambda path, _: optax.contrib.MuonDimensionNumbers() if is_hidden_matrix(path) else None
    dimension_numbers = functools.partial(jax.tree_util.tree_map_with_path, hidden)
    return muon(learning_rate, batch_size, muon_weight_dimension_numbers=dimension_numbers, **others)


def is_hidden_matrix(path: tuple) -> bool:
    """Returns whether a parameter's key path is that of a matrix within a block."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return "blocks" in name and "kernel" in name


def rf_rmsprop(learning_rate: optax.Schedule, batch_size: int, **others: ArrayLike) -> optax.GradientTransformation:
    """Returns RF-RMSProp, for which every character is a term of the loss."""
    return rf.rf_rmsprop(learning_rate, batch_size=batch_size * SEQUENCE, **others)


MUON = {
    "learning_rate": Range(2e-3, 2e-1),
    "beta": MOMENTUM,
    "weight_decay": DECOUPLED_DECAY,
    "adam_ratio": Range(0.05, 1),
}
SIRF_PUBLISHED = {
    "learning_rate": Range(3e-5, 3e-3),
    "preconditioner_lr": Range(0.03, 0.8),
    "damping": DAMPING,
    "momentum": MOMENTUM,
}
SIRF_EXACT = SIRF_PUBLISHED | {"preconditioner_lr": Range(0.01, 0.3)}

sirf_exact = functools.partial(
    rf.sirf_shampoo, update_every=10, refresh="exact", initial_scale="first_gradient", riemannian_momentum=None
)

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
    "muon": Method("Muon", muon, MUON),
    "muon_hidden": Method("Muon, hidden only", muon_hidden, MUON),
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
    "sirf_published": Method("SIRF published, T=1", functools.partial(rf.sirf_shampoo, update_every=1), SIRF_PUBLISHED),
    "sirf_published_t10": Method(
        "SIRF published, T=10", functools.partial(rf.sirf_shampoo, update_every=10), SIRF_PUBLISHED
    ),
    "sirf_exact": Method("SIRF exact, T=10", sirf_exact, SIRF_EXACT),
    "sirf_exact_bfloat16": Method(
        "SIRF exact, bfloat16", functools.partial(sirf_exact, preconditioner_dtype="bfloat16"), SIRF_EXACT
    ),
}

"""The optimizers that the characters compare and the ranges they are tuned in: four hyperparameters each.

Another optimizer joins by one entry in `METHODS` and one run of tune_characters.py.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike
from methods import without_batch_size
from searching import Method, Range

import rootfree_optax as rf

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


PUBLISHED = {
    "learning_rate": Range(3e-5, 3e-3),
    "preconditioner_lr": Range(0.03, 0.8),
    "damping": DAMPING,
    "momentum": MOMENTUM,
}
SCALE_FREE = {
    "learning_rate": Range(3e-4, 3e-2),  # AdamW's
    "momentum": MOMENTUM,
    "statistics_decay": Range(0.01, 0.2, of_one_minus=True),
    "weight_decay": DECOUPLED_DECAY,
}
WHOLE_AXES = rf.Layout(diagonal=None, block_size=None, merge_dims=None)


def published(**settings: Any) -> Callable[..., optax.GradientTransformation]:
    """Returns the published SIRF-Shampoo, with factors for all parameters, as the official code has."""
    return functools.partial(rf.published.sirf_shampoo, layout=WHOLE_AXES, **settings)


def hidden_matrices(make: Callable[..., optax.GradientTransformation], **settings: Any) -> Callable[..., Any]:
    """Returns one of the scale-free Shampoos on hidden matrices, with AdamW for the other parameters."""
    return without_batch_size(functools.partial(make, **settings))


METHODS: dict[str, Method] = {
    "adamw": Method(
        "AdamW",
        without_batch_size(optax.adamw),
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
    "sirf_published": Method("SIRF published, T=1", published(), PUBLISHED),
    "sirf_published_t10": Method("SIRF published, T=10", published(refresh_every=10), PUBLISHED),
    "sirf_shampoo": Method("SIRF-Shampoo", hidden_matrices(rf.sirf_shampoo), SCALE_FREE),
    "kl_shampoo": Method("KL-Shampoo", hidden_matrices(rf.kl_shampoo), SCALE_FREE),
    "sirf_muon": Method("SIRF-Muon", hidden_matrices(rf.sirf_muon), SCALE_FREE),
    "sirf_muon_t1": Method("SIRF-Muon, T=1", hidden_matrices(rf.sirf_muon, refresh_every=1), SCALE_FREE),
}

"""The methods that train_digits.py compares.

AdamW's settings were tuned: 64 random trials of four seeds, then 24 more seeds for the best eight, by validation.
This library's five optimizers, and Muon, take AdamW's learning rate, schedule and weight decay as they are. The paper's
own forms and SGD were tuned with the same budget.

Another method joins by one entry in `METHODS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import optax.contrib
from jax.typing import ArrayLike

import rootfree_optax as rf
from digits.training import BATCH_SIZE, warmup_cosine


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, `build(learning_rate, **settings)`, its settings, and how it is shown."""

    label: str
    color: str
    build: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, Any]

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Returns the transformation for a run of so many steps."""
        settings = dict(self.settings)
        return self.build(warmup_cosine(settings.pop("learning_rate"), steps), **settings)


def muon(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike, b2: ArrayLike, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    """Returns Optax's Muon for matrices, with steps of AdamW's length, and AdamW for the rest.

    A convolution's kernel is a matrix (3·3·inputs, outputs), which Muon has to be told.
    """

    def matrix_axes(params: optax.Params) -> Any:
        axes = lambda ndim: optax.contrib.MuonDimensionNumbers(tuple(range(ndim - 1)), ndim - 1)
        return jax.tree.map(lambda leaf: axes(leaf.ndim) if leaf.ndim > 1 else None, params)

    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=0.2,
    )


def rf_rmsprop(
    learning_rate: optax.ScalarOrSchedule, b1: ArrayLike, b2: ArrayLike, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    """Returns RF-RMSProp with AdamW's settings by their names."""
    return rf.rf_rmsprop(learning_rate, decay=b2, momentum=b1, weight_decay=weight_decay)


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: ArrayLike, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    """Returns stochastic gradient descent with heavy-ball momentum and weight decay."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))


ADAMW = {"learning_rate": 1.476e-2, "b1": 0.7547, "b2": 0.9989, "weight_decay": 0.8691}
# As the official code: factors for all parameters. A convolution's kernel becomes a matrix, (3·3·inputs, outputs).
LAYOUT = rf.Layout(diagonal=None, block_size=None, merge_dims=288)

# The colours are told apart by colour-blind readers, too.
METHODS = {
    "sirf_muon": Method("SIRF-Muon", "#D55E00", rf.sirf_muon, ADAMW),
    "sirf_shampoo": Method("SIRF-Shampoo", "#E69F00", rf.sirf_shampoo, ADAMW),
    "kl_shampoo": Method("KL-Shampoo", "#F0E442", rf.kl_shampoo, ADAMW),
    "rf_adamw": Method("RF-AdamW", "#56B4E9", rf.rf_adamw, ADAMW),
    "rf_rmsprop": Method("RF-RMSProp", "#0072B2", rf_rmsprop, ADAMW),
    "adamw": Method("AdamW", "#009E73", optax.adamw, {**ADAMW, "eps": 2.244e-10}),
    "muon": Method("Muon", "#999999", muon, ADAMW),
    "published_rf_rmsprop": Method(
        "RF-RMSProp, published",
        "#332288",
        rf.published.rf_rmsprop,
        {
            "learning_rate": 2.136e-3,
            "decay": 0.7976,
            "damping": 4.732e-4,
            "momentum": 0.8648,
            "weight_decay": 2.96e-2,
            "batch_size": BATCH_SIZE,
        },
    ),
    "published_rf_adamw": Method(
        "RF-AdamW, published",
        "#88CCEE",
        rf.published.rf_adamw,
        {
            "learning_rate": 5.868e-3,
            "b1": 0.5953,
            "b2": 0.7377,
            "damping": 5.868e-8,
            "weight_decay": 1.664e-3,
            "batch_size": BATCH_SIZE,
        },
    ),
    "published_sirf_shampoo": Method(
        "SIRF-Shampoo, published",
        "#595959",
        rf.published.sirf_shampoo,
        {
            # The second best of its search: with the best, of a damping of 4.6e-8, one seed in ten diverges.
            "learning_rate": 1.032e-3,
            "preconditioner_lr": 0.3817,
            "damping": 4.732e-4,
            "momentum": 0.8648,
            "weight_decay": 2.96e-2,
            "batch_size": BATCH_SIZE,
            "layout": LAYOUT,
        },
    ),
    "sgd": Method(
        "SGD with momentum", "#CC79A7", sgd, {"learning_rate": 0.1018, "momentum": 0.8304, "weight_decay": 7.333e-4}
    ),
}

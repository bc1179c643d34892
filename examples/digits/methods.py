"""The methods that train_digits.py compares, and their settings.

Another method joins by one entry in `METHODS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

import rootfree_optax as rf
from digits.training import BATCH_SIZE, warmup_cosine


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer: `build(learning_rate, batch_size=…, **settings)`, its tuned settings, and how it is shown."""

    label: str
    color: str
    build: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, float]

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Returns the transformation for a run of so many steps; the network's loss averages `BATCH_SIZE` terms."""
        settings = dict(self.settings)
        return self.build(warmup_cosine(settings.pop("learning_rate"), steps), batch_size=BATCH_SIZE, **settings)


def adamw(learning_rate: optax.ScalarOrSchedule, batch_size: ArrayLike, **others: Any) -> optax.GradientTransformation:
    """Returns Optax's AdamW, which does not ask how many terms the loss averages."""
    del batch_size
    return optax.adamw(learning_rate, **others)


def sgd(
    learning_rate: optax.ScalarOrSchedule, batch_size: ArrayLike, momentum: ArrayLike, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    """Returns stochastic gradient descent with heavy-ball momentum and weight decay."""
    del batch_size
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))


def scale_free(
    make: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    batch_size: ArrayLike,
    **others: Any,
) -> optax.GradientTransformation:
    """Returns one of this library's optimizers, of which nothing depends on the batch size."""
    del batch_size
    return make(learning_rate, **others)


# The best of nine settings of AdamW on the validation split. The scale-free methods take AdamW's settings unchanged;
# benchmarks/research/tune_digits.py has tuned the others.
ADAMW = {"learning_rate": 1.5e-2, "weight_decay": 1.0}

# The colours are told apart by colour-blind readers, too.
METHODS = {
    "adamw": Method("AdamW", "#009E73", adamw, ADAMW),
    "sgd": Method(
        "SGD with momentum", "#CC79A7", sgd, {"learning_rate": 0.1018, "momentum": 0.8304, "weight_decay": 7.333e-4}
    ),
    "rf_rmsprop": Method("RF-RMSProp", "#0072B2", functools.partial(scale_free, rf.rf_rmsprop), ADAMW),
    "rf_adamw": Method("RF-AdamW", "#56B4E9", functools.partial(scale_free, rf.rf_adamw), ADAMW),
    "sirf_shampoo": Method("SIRF-Shampoo", "#E69F00", functools.partial(scale_free, rf.sirf_shampoo), ADAMW),
    "kl_shampoo": Method("KL-Shampoo", "#D55E00", functools.partial(scale_free, rf.kl_shampoo), ADAMW),
    "sirf_muon": Method("SIRF-Muon", "#000000", functools.partial(scale_free, rf.sirf_muon), ADAMW),
    "published": Method(
        "SIRF-Shampoo, published",
        "#999999",
        # A convolution's kernel becomes a matrix, (3·3·inputs, outputs).
        functools.partial(rf.published.sirf_shampoo, layout=rf.Layout(merge_dims=288)),
        {
            "learning_rate": 1.019e-3,
            "preconditioner_lr": 0.2688,
            "damping": 4.61e-8,
            "momentum": 0.8093,
            "weight_decay": 3.259e-4,
        },
    ),
}

"""The methods that train_digits.py compares, at the settings that benchmarks/research/tune_digits.py chose.

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


def sirf_exact(
    learning_rate: optax.ScalarOrSchedule,
    batch_size: int,
    preconditioner_lr: ArrayLike,
    update_every: int = 1,
    maximum: float = 0.2,
    **others: Any,
) -> optax.GradientTransformation:
    """Returns SIRF-Shampoo, for a final `preconditioner_lr` that may be traced."""
    average = rf.averaging_schedule(preconditioner_lr, update_every, maximum=maximum)
    return rf.sirf_shampoo(
        learning_rate, preconditioner_lr=average, batch_size=batch_size, update_every=update_every, **others
    )


def sirf_published(learning_rate: optax.ScalarOrSchedule, **others: Any) -> optax.GradientTransformation:
    """Returns SIRF-Shampoo as published: a first-order refresh, with momentum of the factors and of the directions."""
    published = {"refresh": "published", "initial_scale": 1.0, "riemannian_momentum": 0.5}
    return rf.sirf_shampoo(learning_rate, **published, momentum_of="directions", nesterov=False, **others)


# A convolution's kernel becomes a matrix, (3·3·inputs, outputs).
LAYOUT = rf.Layout(merge_dims=288)

# The colours are told apart by colour-blind readers, too.
METHODS = {
    "rf_rmsprop": Method(
        "RF-RMSProp",
        "#0072B2",
        rf.rf_rmsprop,
        {"learning_rate": 2.136e-3, "decay": 0.7976, "damping": 4.732e-4, "momentum": 0.8648, "weight_decay": 2.96e-2},
    ),
    "rf_adamw": Method(
        "RF-AdamW",
        "#56B4E9",
        rf.rf_adamw,
        {"learning_rate": 5.868e-3, "b1": 0.5953, "b2": 0.7377, "damping": 5.868e-8, "weight_decay": 1.664e-3},
    ),
    "sirf_shampoo": Method(
        "SIRF-Shampoo",
        "#E69F00",
        functools.partial(sirf_exact, layout=LAYOUT),
        {
            "learning_rate": 7.406e-3,
            "preconditioner_lr": 1.117e-2,
            "damping": 6.564e-5,
            "momentum": 0.1446,
            "weight_decay": 1.363e-2,
        },
    ),
    "sirf_published": Method(
        "SIRF-Shampoo, published",
        "#595959",
        functools.partial(sirf_published, layout=LAYOUT),
        {
            "learning_rate": 1.019e-3,
            "preconditioner_lr": 0.2688,
            "damping": 4.61e-8,
            "momentum": 0.8093,
            "weight_decay": 3.259e-4,
        },
    ),
    "adamw": Method(
        "AdamW",
        "#009E73",
        adamw,
        {"learning_rate": 1.476e-2, "b1": 0.7547, "b2": 0.9989, "eps": 2.244e-10, "weight_decay": 0.8691},
    ),
    "sgd": Method(
        "SGD with momentum", "#CC79A7", sgd, {"learning_rate": 0.1018, "momentum": 0.8304, "weight_decay": 7.333e-4}
    ),
}

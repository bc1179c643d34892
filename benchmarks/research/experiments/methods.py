"""The optimizers, the ranges they are tuned in, and the values that they have untuned.

Untuned values are the defaults of rootfree_optax or Optax, with zero for what is off by default. A learning rate has
no default: it is recommended from the results, as the one of five spread over its range that does best overall.
"""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from characters.methods import muon
from digits.methods import adamw, sgd, sirf_exact, sirf_published
from jax.typing import ArrayLike
from methods import COUPLED_DECAY, DECAY, DECOUPLED_DECAY, KRONECKER, MOMENTUM, RANGES
from searching import Method, Range

import rootfree_optax as rf
from experiments.distributed_shampoo import PACKAGE, distributed_shampoo

LEARNING_RATES = 5  # at which untuned settings are tried


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate(Method):
    """A method with its untuned values, and what is held fixed but given at run time, so that programs are shared."""

    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def untuned(self) -> dict[str, np.ndarray]:
        """Returns the defaults at each of a few learning rates, spread evenly over the logarithm of their range."""
        low, high, _ = self.ranges["learning_rate"]
        positions = (np.arange(LEARNING_RATES) + 0.5) / LEARNING_RATES
        rates = {"learning_rate": low * (high / low) ** positions}
        return rates | {name: np.full(LEARNING_RATES, value) for name, value in self.defaults.items()}


def rmsprop(
    learning_rate: optax.Schedule,
    batch_size: ArrayLike,
    decay: ArrayLike,
    eps: ArrayLike,
    momentum: ArrayLike,
    weight_decay: ArrayLike,
) -> optax.GradientTransformation:
    """Returns RMSProp with weight decay and heavy-ball momentum where RF-RMSProp has them."""
    del batch_size
    return optax.chain(
        optax.scale_by_rms(decay, eps),
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def rf_rmsprop(
    learning_rate: optax.Schedule, batch_size: int, counts_terms: ArrayLike, **others: Any
) -> optax.GradientTransformation:
    """Returns RF-RMSProp; `counts_terms` of zero leaves the factor B out."""
    return rf.rf_rmsprop(learning_rate, batch_size=1 + counts_terms * (batch_size - 1.0), **others)


RF_RMSPROP = RANGES["rf_rmsprop"] | {"learning_rate": Range(1e-3, 1)}
RF_ADAMW = RANGES["rf_adamw"] | {"learning_rate": Range(1e-3, 1)}
EXACT = KRONECKER | {"learning_rate": Range(3e-5, 3e-2), "preconditioner_lr": Range(1e-2, 3e-1)}


def defaults_of(make: Callable[..., Any], ranges: Mapping[str, Range]) -> dict[str, float]:
    """Returns an optimizer's own defaults of what is tuned, zero for None."""
    parameters = inspect.signature(make).parameters
    return {name: parameters[name].default or 0.0 for name in ranges if name != "learning_rate"}


RF_RMSPROP_DEFAULTS = defaults_of(rf.rf_rmsprop, RF_RMSPROP)
PUBLISHED_DEFAULTS = {"preconditioner_lr": 0.2, "damping": 1e-4, "momentum": 0.9, "weight_decay": 0.0}
EXACT_DEFAULTS = defaults_of(rf.sirf_shampoo, EXACT) | {"preconditioner_lr": 0.1}  # which its schedule falls to
FROM_ONE_WITH_TERMS = {"counts_terms": 1.0, "initial_scale": 1.0}

METHODS: dict[str, Candidate] = {
    "sgd": Candidate(
        "SGD with momentum",
        sgd,
        {"learning_rate": Range(3e-3, 3), "momentum": MOMENTUM, "weight_decay": COUPLED_DECAY},
        {"momentum": 0.0, "weight_decay": 0.0},
    ),
    "rmsprop": Candidate(
        "RMSProp",
        rmsprop,
        {
            "learning_rate": Range(1e-4, 1e-1),
            "decay": DECAY,
            "eps": Range(1e-10, 1e-6),
            "momentum": MOMENTUM,
            "weight_decay": COUPLED_DECAY,
        },
        {"decay": 0.9, "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0},
    ),
    "adamw": Candidate(
        "AdamW",
        adamw,
        RANGES["adamw"],
        {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-4},
    ),
    "muon": Candidate(
        "Muon",
        muon,
        {
            "learning_rate": Range(2e-3, 2e-1),
            "beta": MOMENTUM,
            "adam_ratio": Range(0.05, 1),
            "weight_decay": DECOUPLED_DECAY,
        },
        {"beta": 0.95, "adam_ratio": 1.0, "weight_decay": 0.0},
    ),
    "rf_rmsprop": Candidate("RF-RMSProp", rf_rmsprop, RF_RMSPROP, RF_RMSPROP_DEFAULTS, FROM_ONE_WITH_TERMS),
    "rf_adamw": Candidate("RF-AdamW", rf.rf_adamw, RF_ADAMW, defaults_of(rf.rf_adamw, RF_ADAMW)),
    "rf_shampoo": Candidate("RF-Shampoo", rf.rf_shampoo, KRONECKER, defaults_of(rf.rf_shampoo, KRONECKER)),
    "sirf_shampoo": Candidate("SIRF-Shampoo, published", sirf_published, KRONECKER, PUBLISHED_DEFAULTS),
    "sirf_bfloat16": Candidate(
        "SIRF-Shampoo, bfloat16",
        functools.partial(sirf_published, preconditioner_dtype="bfloat16"),
        KRONECKER,
        PUBLISHED_DEFAULTS,
    ),
    "sirf_hierarchical": Candidate(
        "SIRF-Shampoo, hierarchical",
        functools.partial(sirf_published, layout=rf.Layout(structure="hierarchical4_4")),
        KRONECKER,
        PUBLISHED_DEFAULTS,
    ),
    "sirf_exact": Candidate(
        "SIRF-Shampoo, exact", functools.partial(sirf_exact, update_every=1), EXACT, EXACT_DEFAULTS
    ),
    "distributed_shampoo": Candidate(
        "Distributed Shampoo",
        distributed_shampoo,
        {
            "learning_rate": Range(3e-4, 1e-1),
            "beta1": MOMENTUM,
            "beta2": DECAY,
            "matrix_epsilon": Range(1e-8, 5e-4),
        },
        {"beta1": 0.9, "beta2": 0.999, "matrix_epsilon": 1e-6},
    ),
    "rf_rmsprop_without_terms": Candidate(
        "RF-RMSProp without B",
        rf_rmsprop,
        RF_RMSPROP,
        RF_RMSPROP_DEFAULTS,
        FROM_ONE_WITH_TERMS | {"counts_terms": 0.0},
    ),
    "rf_rmsprop_from_zero": Candidate(
        "RF-RMSProp, s from 0",
        rf_rmsprop,
        RF_RMSPROP,
        RF_RMSPROP_DEFAULTS,
        FROM_ONE_WITH_TERMS | {"initial_scale": 0.0},
    ),
}
_NEEDS = {
    "distributed_shampoo": importlib.util.find_spec(PACKAGE) is not None,
    "muon": "adam_learning_rate" in inspect.signature(optax.contrib.muon).parameters,
}
ABSENT = tuple(name for name, is_met in _NEEDS.items() if not is_met)

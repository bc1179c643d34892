"""The optimizers under contract, in one table.

A new optimizer joins by one line in `OPTIMIZERS` (a whole optimizer) or `TRANSFORMATIONS` (a `scale_by_*`); a new
numeric hyperparameter by one line in `HYPERPARAMETERS`. Every test in test_contract_*.py, and Optax's own suites in
test_optax_suites.py, then run on it.
"""

import collections.abc
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from kronecker_runs import PUBLISHED, PUBLISHED_MOMENTUM

import rootfree_optax as rf

# Two admissible values of every numeric hyperparameter, exact in bfloat16: `optax.inject_hyperparams` rounds to the
# parameters' dtype.
HYPERPARAMETERS = {
    "learning_rate": (0.125, 0.0625),
    "decay": (0.875, 0.5),
    "b1": (0.75, 0.5),
    "b2": (0.875, 0.5),
    "damping": (0.125, 0.5),
    "momentum": (0.5, 0.75),
    "weight_decay": (0.25, 0.5),
    "riemannian_momentum": (0.5, 0.25),
    "preconditioner_lr": (0.125, 0.25),
    "batch_size": (4.0, 6.0),
    "initial_scale": (1.0, 2.0),
    "trust_radius": (0.5, 0.25),
}
# Parameters that count steps: whole Python numbers, or callables that are no schedules of a number.
INTERVALS = ("update_every", "curvature_every")


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer or transformation under contract.

    Attributes:
      name: how the tests call it.
      make: its public constructor.
      settings: keyword arguments that make the variant; a whole optimizer converges with them on every target.
      mechanized: other settings for `optax.contrib.mechanize`, which finds the step size itself.
      unscheduled: hyperparameters that this variant refuses as a schedule although its constructor takes one.
      elementwise: whether each entry is preconditioned by itself, with state of the parameter's shape.
      complex_parameters: whether complex parameters are supported; if not, `init` refuses them with a TypeError.
    """

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    settings: Mapping[str, Any]
    mechanized: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unscheduled: frozenset[str] = frozenset()
    elementwise: bool = True
    complex_parameters: bool = True

    @property
    def positive(self) -> set[str]:
        """The hyperparameters that may not be zero."""
        return {"batch_size"} if self.elementwise else {"batch_size", "initial_scale", "trust_radius"}

    @property
    def static(self) -> list[str]:
        """The constructor's parameters that are no numbers."""
        return [name for name in self.parameters if name not in numeric_parameters(self.make)]

    def __call__(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation, with `changes` to its settings."""
        return self.make(**{**self.settings, **changes})

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The constructor's parameters by name."""
        return inspect.signature(self.make).parameters

    @property
    def numeric(self) -> list[str]:
        """The numeric hyperparameters that this variant does not leave at None."""
        defaults = {name: parameter.default for name, parameter in self.parameters.items()}
        settings = {**defaults, **self.settings}
        return [name for name in numeric_parameters(self.make) if settings[name] is not None]

    @property
    def schedulable(self) -> list[str]:
        """The numeric hyperparameters of this variant that may be schedules."""
        schedules = numeric_parameters(self.make, schedule=True)
        return [name for name in self.numeric if name in schedules and name not in self.unscheduled]


def numeric_parameters(make: Callable[..., Any], *, schedule: bool = False) -> list[str]:
    """Returns the parameters whose annotation admits an array and, with `schedule`, also a schedule."""

    def admits(annotation: Any) -> bool:
        alternatives = [typing.get_origin(a) or a for a in typing.get_args(annotation)]
        return jax.Array in alternatives and (not schedule or collections.abc.Callable in alternatives)

    parameters = inspect.signature(make).parameters
    return [name for name in parameters if name not in INTERVALS and admits(parameters[name].annotation)]


_CONVERGENT = {"damping": 1e-2, "batch_size": 1}
_MOMENTUM = {
    "learning_rate": 4e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "accumulator_dtype": jnp.dtype(jnp.float32),
    **_CONVERGENT,
}
_ADAM_FREE = {"learning_rate": 1.0, "b2": 0.99, "damping": 1.0}

_KRONECKER = {
    "learning_rate": 2e-3,
    "momentum": 0.9,
    "weight_decay": 1e-5,
    "preconditioner_lr": 0.01,
    "damping": 0.1,
    "batch_size": 1,
}

OPTIMIZERS = (
    Case(
        "rf_rmsprop",
        rf.rf_rmsprop,
        {"learning_rate": 2e-2, **_CONVERGENT},
        mechanized={"learning_rate": 1.0, "decay": 0.9999, "damping": 1.0},
    ),
    Case("rf_rmsprop_momentum", rf.rf_rmsprop, _MOMENTUM, mechanized={"learning_rate": 1.0, "damping": 1.0}),
    Case("rf_adamw", rf.rf_adamw, {"learning_rate": 2e-2, **_CONVERGENT}, mechanized=_ADAM_FREE),
    Case(
        "rf_adamw_bias_correction",
        rf.rf_adamw,
        {"learning_rate": 3e-2, "b1": 0.9, "b2": 0.999, "bias_correction": True, "initial_scale": 0.0, **_CONVERGENT},
        mechanized=_ADAM_FREE,
        unscheduled=frozenset({"b2"}),
    ),
    Case(
        "rf_shampoo",
        rf.rf_shampoo,
        _KRONECKER,
        mechanized={"learning_rate": 1.0, "damping": 1.0},
        elementwise=False,
        complex_parameters=False,
    ),
    Case(
        "sirf_shampoo_published",
        rf.sirf_shampoo,
        # At the others' learning rate, how near it comes to Rosenbrock's minimum is decided by rounding.
        {
            "update_every": 2,
            "riemannian_momentum": 0.5,
            **PUBLISHED,
            **PUBLISHED_MOMENTUM,
            **_KRONECKER,
            "learning_rate": 5e-4,
        },
        mechanized={"learning_rate": 1.0, "damping": 1.0},
        elementwise=False,
        complex_parameters=False,
    ),
    Case(
        "sirf_shampoo",
        rf.sirf_shampoo,
        _KRONECKER,
        mechanized={"learning_rate": 1.0, "damping": 1.0},
        elementwise=False,
        complex_parameters=False,
    ),
    Case(
        "sirf_shampoo_interval",
        rf.sirf_shampoo,
        {"update_every": 3, "curvature_every": 1, "trust_radius": 8.0, **_KRONECKER},
        mechanized={"learning_rate": 1.0, "damping": 1.0},
        elementwise=False,
        complex_parameters=False,
    ),
)

TRANSFORMATIONS = (
    Case("scale_by_rf_rms", rf.scale_by_rf_rms, {"batch_size": 1}),
    Case(
        "scale_by_rf_adam_bfloat16_state",
        rf.scale_by_rf_adam,
        {"batch_size": 1, "accumulator_dtype": jnp.dtype(jnp.bfloat16)},
    ),
)

ALL = OPTIMIZERS + TRANSFORMATIONS


def over(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    """Runs a test once per case, which it takes as the argument `case`."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def tolerance_of(case: Case, dtype: Any = jnp.float32) -> float:
    """Returns the tolerance for numbers computed in another order, with parameters of `dtype`."""
    dtypes = [dtype, *(value for name, value in case.settings.items() if name.endswith("_dtype"))]
    return max(1e-5, *(4 * float(jnp.finfo(dtype).eps) for dtype in dtypes))


def tolerance_alone(case: Case, dtype: Any = jnp.float32) -> float:
    """Returns the tolerance for an array updated among others or alone: none, unless it shares a product with them."""
    return 0.0 if case.elementwise else tolerance_of(case, dtype)

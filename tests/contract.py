"""The optimizers under contract, in one table.

A new optimizer joins by one line in `OPTIMIZERS` (a whole optimizer) or `TRANSFORMATIONS` (a `scale_by_*`); a new
numeric hyperparameter by one line in `HYPERPARAMETERS`. Every test in contract/, and Optax's own suites, then run on
it: its numbers by default, the wiring that all have in common with `pytest -m contract`.
"""

import collections.abc
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from soap import scale_by_soap

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
    "statistics_decay": (0.75, 0.5),
    "riemannian_momentum": (0.5, 0.25),
    "preconditioner_lr": (0.125, 0.25),
    "batch_size": (4.0, 6.0),
    "initial_scale": (1.0, 2.0),
    "trust_radius": (0.5, 0.25),
    "absolute_damping": (0.125, 0.5),
    "eps": (0.125, 0.5),
}
# Parameters that count steps: whole Python numbers, or callables that are no schedules of a number.
INTERVALS = ("refresh_every", "statistics_every")


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer or transformation under contract.

    Attributes:
      name: how the tests call it.
      make: its public constructor.
      settings: keyword arguments that make the variant; a whole optimizer converges with them on every target.
      mechanized: other settings for `optax.contrib.mechanize`, which finds the step size itself.
      unscheduled: hyperparameters that this variant refuses as a schedule although its constructor takes one.
      diagonal: whether the state is of the parameters' shapes. Only then are complex parameters supported; otherwise
        `init` refuses them with a TypeError.
      elementwise: whether each entry is preconditioned by itself.
      differentiable: whether updates have derivatives; those of eigenvectors are infinite where eigenvalues repeat.
      in_default_suite: whether numbers are tested by default, and not with `pytest -m contract` alone.
    """

    name: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    settings: Mapping[str, Any]
    mechanized: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unscheduled: frozenset[str] = frozenset()
    diagonal: bool = False
    elementwise: bool = False
    differentiable: bool = True
    in_default_suite: bool = True

    @property
    def is_staggered(self) -> bool:
        """Whether blocks are refreshed in turn, so that the step of a turn depends on how many others there are."""
        return self.settings.get("refresh_every") == rf.staggered(2)

    @property
    def positive(self) -> set[str]:
        """The hyperparameters that may not be zero."""
        always = {"batch_size", "trust_radius", "statistics_decay"}
        return always if self.diagonal else always | {"initial_scale"}

    @property
    def static(self) -> list[str]:
        """The constructor's parameters that are no numbers, or have no effect."""
        return [name for name in self.parameters if name not in self.numeric]

    def __call__(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation, with `changes` to its settings; the same one for equal numbers.

        So that tests share the programs of `jax.jit(tx.update)`.
        """
        if all(isinstance(value, (int, float, str, type(None))) for value in changes.values()):
            return _transformation(self.name, tuple(sorted(changes.items())))
        return self.make(**{**self.settings, **changes})

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The constructor's parameters by name."""
        return inspect.signature(self.make).parameters

    @property
    def numeric(self) -> list[str]:
        """The numeric hyperparameters of this variant that have an effect: not those left at None."""
        defaults = {name: parameter.default for name, parameter in self.parameters.items()}
        settings = {**defaults, **self.settings}
        if settings.get("step_size") == "adamw":
            settings["absolute_damping"] = None
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


_FLOAT32_STATE = {"mu_dtype": jnp.dtype(jnp.float32), "nu_dtype": jnp.dtype(jnp.float32)}
_DIAGONAL = {"learning_rate": 2e-2, "damping": 1e-2}
_MATRIX = {"learning_rate": 2e-2, "momentum": 0.9, "refresh_every": 3}
_NEWTON = {"step_size": "newton", "batch_size": 1, "damping": 1e-2, "absolute_damping": 0.1}
_MATRIX_NEWTON = {**_MATRIX, **_NEWTON, "learning_rate": 2e-3}
_PAPER = {"damping": 1e-2, "batch_size": 1}
_PAPER_MATRIX = {"learning_rate": 2e-3, "preconditioner_lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5, **_PAPER}

_rms = functools.partial(Case, mechanized={"learning_rate": 1.0, "damping": 1.0}, diagonal=True)
_adam = functools.partial(Case, mechanized={"learning_rate": 1.0, "b2": 0.99, "damping": 1.0}, diagonal=True)
_matrix = functools.partial(Case, mechanized={"learning_rate": 1.0, "damping": 1.0})
# Mechanic begins with a millionth of a step, which a parameter of 32 bits has to tell from none.
_newton = functools.partial(
    Case, mechanized={"learning_rate": 1e3, "damping": 1.0}, diagonal=True, in_default_suite=False
)

OPTIMIZERS = (
    _rms("rf_rmsprop", rf.rf_rmsprop, {**_DIAGONAL, **_FLOAT32_STATE}),
    _newton("rf_rmsprop_newton", rf.rf_rmsprop, {**_DIAGONAL, **_NEWTON}),
    _adam("rf_adamw", rf.rf_adamw, _DIAGONAL),
    _newton("rf_adamw_newton", rf.rf_adamw, {**_DIAGONAL, **_NEWTON}),
    _matrix("sirf_muon", rf.sirf_muon, _MATRIX),
    _matrix("sirf_muon_newton", rf.sirf_muon, _MATRIX_NEWTON, in_default_suite=False),
    _matrix("sirf_shampoo", rf.sirf_shampoo, _MATRIX),
    _matrix(
        "sirf_shampoo_newton",
        rf.sirf_shampoo,
        {**_MATRIX_NEWTON, "trust_radius": 8.0},
        in_default_suite=False,
    ),
    _matrix("kl_shampoo", rf.kl_shampoo, _MATRIX),
    _matrix(
        "kl_shampoo_newton_staggered",
        rf.kl_shampoo,
        {**_MATRIX_NEWTON, "trust_radius": 8.0, "refresh_every": rf.staggered(2)},
        in_default_suite=False,
    ),
    _rms(
        "published_rf_rmsprop",
        rf.published.rf_rmsprop,
        {"learning_rate": 4e-3, "momentum": 0.9, "weight_decay": 1e-4, **_PAPER},
        elementwise=True,
    ),
    _adam(
        "published_rf_adamw",
        rf.published.rf_adamw,
        {"learning_rate": 3e-2, "b1": 0.9, "b2": 0.999, "bias_correction": True, "initial_scale": 0.0, **_PAPER},
        unscheduled=frozenset({"b2"}),
        elementwise=True,
    ),
    _matrix("published_rf_shampoo", rf.published.rf_shampoo, {**_PAPER_MATRIX, "damping": 0.1}),
    # At the others' learning rate, how near it comes to Rosenbrock's minimum is decided by rounding.
    _matrix(
        "published_sirf_shampoo",
        rf.published.sirf_shampoo,
        {**_PAPER_MATRIX, "damping": 0.1, "refresh_every": 2, "learning_rate": 5e-4},
    ),
)

TRANSFORMATIONS = (
    Case(
        "scale_by_rf_adam_bfloat16_state",
        rf.scale_by_rf_adam,
        {"mu_dtype": jnp.dtype(jnp.bfloat16), "nu_dtype": jnp.dtype(jnp.bfloat16)},
        diagonal=True,
    ),
    # A user's rule. Damped, because what it divides rounding errors by is a rounding error; and without eigenvectors of
    # the longer axis of 8×4, of which one gradient leaves four to rounding errors.
    Case(
        "scale_by_soap",
        scale_by_soap,
        {"damping": 0.1, "refresh_every": 2, "layout": rf.Layout(max_dense_dim=4, diagonal=None, merge_dims=None)},
        differentiable=False,
    ),
)

ALL = OPTIMIZERS + TRANSFORMATIONS
# One case of each constructor of the library, whose errors and documented ranges are part of the contract.
CONSTRUCTORS = tuple(
    {case.make: case for case in reversed(ALL) if case.make.__module__.startswith("rootfree_optax")}.values()
)
# What all have in common is tested on one diagonal and one Kronecker method, unless `-m contract` asks for all.
DIAGONAL_REPRESENTATIVE = "rf_rmsprop"
REPRESENTATIVES = (DIAGONAL_REPRESENTATIVE, "published_sirf_shampoo")


@functools.cache
def _transformation(name: str, changes: tuple[tuple[str, Any], ...]) -> optax.GradientTransformationExtraArgs:
    [case] = [case for case in ALL if case.name == name]
    return case.make(**{**case.settings, **dict(changes)})


def over(cases: Iterable[Case], *, having: str | None = None, wiring: bool = False) -> pytest.MarkDecorator:
    """Runs a test once per case, which it takes as the argument `case`.

    Args:
      cases: the cases.
      having: the name of a hyperparameter or option; cases that have none of this name, or leave it without effect, are
        left out.
      wiring: whether all cases share the code under test, so that representatives serve by default.
    """

    def has_it(case: Case) -> bool:
        return having in case.parameters and (having in case.numeric or having not in numeric_parameters(case.make))

    def marks_of(case: Case) -> list[pytest.MarkDecorator]:
        by_default = case.name in REPRESENTATIVES if wiring else case.in_default_suite
        return [] if by_default else [pytest.mark.contract]

    return pytest.mark.parametrize(
        "case",
        [pytest.param(case, marks=marks_of(case)) for case in cases if having is None or has_it(case)],
        ids=lambda case: case.name,
    )


def tolerance_of(case: Case, dtype: Any = jnp.float32) -> float:
    """Returns the tolerance for numbers computed in another order, with parameters of `dtype`."""
    dtypes = [dtype, *(value for name, value in case.settings.items() if name.endswith("_dtype"))]
    return max(1e-5, *(4 * float(jnp.finfo(dtype).eps) for dtype in dtypes))


def tolerance_alone(case: Case, dtype: Any = jnp.float32) -> float:
    """Returns the tolerance for an array updated among others or alone: none, unless it shares a product with them."""
    return 0.0 if case.elementwise else tolerance_of(case, dtype)

"""The optimizers under contract, in one table, and what the contract tests share.

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
import numpy as np
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


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns parameters with a matrix, a vector and a scalar."""
    rng = np.random.default_rng(1)
    return {
        "layer": {
            "kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype),
            "bias": jnp.asarray(rng.normal(size=3), dtype),
        },
        "scale": jnp.asarray(rng.normal(), dtype),
    }


def make_gradients(params: Any, steps: int, dtype: Any = None) -> list[Any]:
    """Returns the gradients of several steps, trees like `params`, of `dtype` or each parameter's own."""
    rng = np.random.default_rng(2)

    def draw(param: jax.Array) -> jax.Array:
        real, imaginary = rng.normal(size=(2, *param.shape))
        of_dtype = param.dtype if dtype is None else jnp.dtype(dtype)
        is_complex = jnp.issubdtype(of_dtype, jnp.complexfloating)
        return jnp.asarray(real + 1j * imaginary if is_complex else real, dtype=of_dtype)

    return [jax.tree.map(draw, params) for _ in range(steps)]


def run(tx: optax.GradientTransformationExtraArgs, params: Any, gradients: Any, **extra_args: Any) -> tuple[Any, Any]:
    """Returns the updates of every step, as a list, and the last state.

    Eager, so that the small programs of one operation each are compiled once for all tests.
    """
    state = tx.init(params)
    history = []
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state


def types(tree: Any) -> Any:
    """Returns the type of every array: shape, dtype, weak type and, on an explicit mesh, sharding."""
    return jax.tree.map(lambda leaf: (jax.typeof(leaf), leaf.weak_type), tree)


def shapes_and_dtypes(tree: Any) -> Any:
    """Returns the tree with each array replaced by its shape and dtype."""
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Asserts that two trees agree in structure, shapes and dtypes, and entries to `tolerance` of the array's largest.

    A tolerance of zero demands equal bits.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert shapes_and_dtypes(actual) == shapes_and_dtypes(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        wide = np.complex128 if jnp.iscomplexobj(a) else np.float64
        a, e = np.asarray(a).astype(wide), np.asarray(e).astype(wide)
        largest = np.max(np.abs(e), initial=0.0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


def tolerance_of(case: Case, dtype: Any = jnp.float32) -> float:
    """Returns the tolerance for numbers computed in another order, with parameters of `dtype`."""
    dtypes = [dtype, *(value for name, value in case.settings.items() if name.endswith("_dtype"))]
    return max(1e-5, *(4 * float(jnp.finfo(dtype).eps) for dtype in dtypes))


def tolerance_alone(case: Case, dtype: Any = jnp.float32) -> float:
    """Returns the tolerance for an array updated among others or alone: none, unless it shares a product with them."""
    return 0.0 if case.elementwise else tolerance_of(case, dtype)


def refuses(error: type[Exception], *fragments: str) -> Any:
    """Expects an error whose message has all of the fragments."""
    return pytest.raises(error, check=lambda e: all(fragment in str(e) for fragment in fragments))

"""Shampoo with its root, from the package `precondition-opt`, whose last release calls names that JAX has removed.

As published, it fails at `init` under JAX 0.10: module 'jax' has no attribute 'tree_map'. Here those names are back
while its functions are traced, and only then. Roots are taken by eigendecomposition: the package's own iteration took
more than three minutes to compile for a network of three matrices.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import optax
from jax.typing import ArrayLike

PACKAGE = "precondition"
EVERY = 5
BLOCK = 64
REMOVED = {f"tree_{name}": getattr(jax.tree, name) for name in ("map", "flatten", "unflatten", "leaves", "structure")}


def distributed_shampoo(
    learning_rate: optax.Schedule, batch_size: ArrayLike, **others: Any
) -> optax.GradientTransformation:
    """Returns the package's Distributed Shampoo with RMSProp's step length and new roots at every few steps.

    Its weight decay has to be a Python number, so that a traced one is none of its hyperparameters.
    """
    del batch_size
    module = importlib.import_module(f"{PACKAGE}.distributed_shampoo")
    inner = module.distributed_shampoo(
        learning_rate,
        block_size=BLOCK,
        graft_type=module.GraftingType.RMSPROP_NORMALIZED,
        preconditioning_compute_steps=EVERY,
        generate_training_metrics=False,
        eigh=True,
        **others,
    )
    return optax.GradientTransformation(*(with_removed_names(function) for function in inner))


def with_removed_names(function: Callable) -> Callable:
    """Returns the function, during whose calls alone JAX has its former names."""

    @functools.wraps(function)
    def called(*args: Any) -> Any:
        with mock.patch.multiple(jax, create=True, **REMOVED), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Explicitly requested dtype float64")
            return function(*args)

    return called

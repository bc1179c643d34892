"""Shampoo with its root, from the package `precondition-opt`, whose last release calls names that JAX has removed."""

import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import optax
from jax.typing import ArrayLike

PACKAGE = "precondition"
REMOVED = {f"tree_{name}": getattr(jax.tree, name) for name in ("map", "flatten", "unflatten", "leaves", "structure")}


def distributed_shampoo(
    learning_rate: optax.Schedule, batch_size: ArrayLike, **others: Any
) -> optax.GradientTransformation:
    """Returns the package's Distributed Shampoo with roots at every step."""
    del batch_size
    module = importlib.import_module(f"{PACKAGE}.distributed_shampoo")
    inner = module.distributed_shampoo(learning_rate, block_size=128, generate_training_metrics=False, **others)
    return optax.GradientTransformation(*(with_removed_names(function) for function in inner))


def with_removed_names(function: Callable) -> Callable:
    """Returns the function, during whose calls alone JAX has its former names."""

    @functools.wraps(function)
    def called(*args: Any) -> Any:
        with mock.patch.multiple(jax, create=True, **REMOVED):
            return function(*args)

    return called

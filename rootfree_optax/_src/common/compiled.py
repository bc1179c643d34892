"""Functions of arrays and of hashable values, compiled once for equal values: the arrays may change, at no cost."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

_ARRAY = object()


@dataclasses.dataclass(frozen=True)
class Static:
    """A tree without its arrays. It is hashable, so that compiled programs are found by it."""

    structure: Any
    values: tuple[Any, ...]  # _ARRAY where an array was

    def insert(self, arrays: Sequence[jax.Array]) -> Any:
        """Returns the tree with arrays in their places."""
        remaining = iter(arrays)
        leaves = [next(remaining) if value is _ARRAY else value for value in self.values]
        return jax.tree.unflatten(self.structure, leaves)


def take_arrays(tree: Any) -> tuple[Static, list[jax.Array]]:
    """Returns a tree without its arrays, and these."""
    leaves, structure = jax.tree.flatten(tree)
    values = tuple(_ARRAY if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves)
    return Static(structure, values), [leaf for leaf, value in zip(leaves, values, strict=True) if value is _ARRAY]


def call_compiled(function: Callable[..., Any], mixed: Sequence[Any], *trees: Any) -> Any:
    """Returns `function(*mixed, *trees)`, compiled as one program.

    Args:
      function: a function of a module, rather than a new one at each call: compiled programs are found by its identity.
      mixed: trees of arrays and of hashable values.
      *trees: of arrays.
    """
    static, arrays = take_arrays(mixed)
    return _call(function, static, arrays, trees)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(function: Callable[..., Any], static: Static, arrays: list[jax.Array], trees: Any) -> Any:
    return function(*static.insert(arrays), *trees)

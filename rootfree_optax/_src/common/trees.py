"""Trees of parameters and gradients: their checks, and maps over them."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Shape: TypeAlias = tuple[int, ...]


# Partials of functions in C: they are called at every node of a tree, where functions in Python would be slow.
is_none: Callable[[Any], bool] = functools.partial(operator.is_, None)
path_of: Callable[[Any], str] = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by key path, such as 'layer/kernel'. None is a leaf."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)}


def has_none(tree: Any) -> bool:
    """Returns whether a leaf of the tree is None."""
    return any(map(is_none, jax.tree.leaves(tree, is_leaf=is_none)))


def has_tracer(tree: Any) -> bool:
    """Returns whether a leaf of the tree is traced, so that the caller's program is being made."""
    return bool([leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.core.Tracer)])


def require_inexact(params: Any) -> None:
    """Raises a TypeError for a parameter that is neither real nor complex floating point of 16 bits at least."""
    for path, leaf in named_leaves(params).items():
        if leaf is not None and not _is_of_kind(leaf, jnp.inexact):
            raise _refusal(path, leaf, "floating point")


def _is_of_kind(leaf: Any, kind: Any) -> bool:
    """Returns whether a leaf is an array or a number of such a dtype, of 16 bits at least."""
    dtype = getattr(leaf, "dtype", None) or np.dtype(type(leaf))
    return jnp.issubdtype(dtype, kind) and dtype.itemsize > 1


def _refusal(path: str, leaf: Any, kind: str) -> TypeError:
    dtype = getattr(leaf, "dtype", None)
    remedy = "Exclude it from the optimizer with optax.masked or optax.partition."
    if dtype is None:
        remedy += " Of an Equinox model, give init eqx.filter(model, eqx.is_inexact_array)."
    elif jnp.issubdtype(dtype, jnp.complexfloating):
        remedy = "Wrap the optimizer in optax.contrib.split_real_and_imaginary, or use optax.partition."
    found = repr(leaf) if dtype is None else dtype
    return TypeError(f"parameters must be {kind} of at least 16 bits, got {found} at {path!r}. {remedy}")


def real_shapes(params: Any, gradients: Any = None) -> tuple[tuple[str, Shape], ...]:
    """Returns the parameters' key paths and shapes.

    Args:
      params: the parameters.
      gradients: a tree like them. What is no array of real floating point and has no gradient, such as a function in a
        model, is no parameter.

    Raises:
      TypeError: for a parameter that is not real floating point.
      ValueError: for two parameters with the same key path, as in {'a/b': x, 'a': {'b': y}}.
    """
    shapes: dict[str, Shape] = {}
    others = named_leaves(gradients)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if not _is_of_kind(leaf, jnp.floating):
            if gradients is not None and others.get(path) is None:
                continue
            raise _refusal(path, leaf, "real floating point")
        if path in shapes:
            raise ValueError(f"parameters must have distinct key paths, but two of them have {path!r}. Rename one.")
        shapes[path] = jnp.shape(leaf)
    return tuple(shapes.items())


def require_like(tree: Any, reference: Any, *, name: str, sample_axis: bool = False) -> None:
    """Raises a ValueError for a leaf of `tree` whose path or shape differs from that in `reference`.

    Args:
      tree: gradients, or another tree that must be like the parameters. None, for a parameter without a gradient,
        matches any shape.
      reference: a tree of arrays of the parameters' shapes.
      name: the name of `tree` in the message.
      sample_axis: whether each leaf may have an additional leading axis.
    """
    shapes = {path: None if leaf is None else jnp.shape(leaf) for path, leaf in named_leaves(reference).items()}
    require_shapes(named_leaves(tree), shapes, name=name, sample_axis=sample_axis)


def require_shapes(
    leaves: Mapping[str, Any],
    shapes: Mapping[str, Shape | None],
    *,
    name: str,
    sample_axis: bool = False,
    kind: Any = jnp.inexact,
) -> None:
    """Raises a ValueError for a leaf whose path or shape differs from the expected one, a TypeError for its dtype.

    Args:
      leaves: the leaves by key path, see `named_leaves`. None matches any shape.
      shapes: the expected shapes by key path. None matches any leaf.
      name: the name of the tree in the message.
      sample_axis: whether each leaf may have an additional leading axis.
      kind: `jnp.floating`, or `jnp.inexact` for complex arrays, too.
    """
    if difference := leaves.keys() ^ shapes.keys():
        path = min(difference)
        fault = "is no parameter" if path in leaves else "is missing"
        raise ValueError(f"{name} must be a tree like the parameters given to init, but {path!r} {fault}.")
    for path, leaf in leaves.items():
        wanted = shapes[path]
        if leaf is None or wanted is None:
            continue
        shape = jnp.shape(leaf)
        if shape != wanted and not (sample_axis and shape[1:] == wanted and shape):
            raise ValueError(f"{name} must have the parameters' shapes, got {shape} at {path!r} instead of {wanted}.")
        if hasattr(leaf, "dtype") and not _is_of_kind(leaf, kind):
            raise TypeError(
                f"{name} must be {'real ' if kind is jnp.floating else ''}floating point of at least 16 bits, got "
                f"{leaf.dtype} at {path!r}. Cast them, as jax.tree.map(lambda g: g.astype(jnp.float32), grads) does."
            )


def map_gradients(function: Callable[..., Any], gradients: Any, *rest: Any) -> Any:
    """Maps `function(gradient, *others)` over trees; a gradient of None gives None."""
    return jax.tree.map(
        lambda g, *others: None if g is None else function(jnp.asarray(g), *others), gradients, *rest, is_leaf=is_none
    )


def map_steps(function: Callable[..., tuple[Any, ...]], gradients: Any, *accumulators: Any) -> tuple[Any, ...]:
    """Maps `function(gradient, *accumulators)`, which returns a result and new accumulators; returns a tree of each.

    A gradient of None gives None, and leaves the accumulators as they were.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(gradients, is_leaf=is_none)
    old = zip(leaves, *map(structure.flatten_up_to, accumulators), strict=True)
    new = [(None, *kept) if g is None else function(jnp.asarray(g), *kept) for g, *kept in old]
    return tuple(jax.tree.unflatten(structure, [each[i] for each in new]) for i in range(1 + len(accumulators)))

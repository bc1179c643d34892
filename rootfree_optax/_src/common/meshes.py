"""Which mesh is in use, and how arrays are sharded over it."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh: TypeAlias = Mesh | AbstractMesh
Axes: TypeAlias = tuple[str, ...]
Spec: TypeAlias = tuple[Axes, ...]  # for each axis of an array, the axes of the mesh that divide it

_typed_axes: contextvars.ContextVar[Axes | None] = contextvars.ContextVar("typed_axes", default=None)


def axes_of_type(mesh: AnyMesh, *kinds: AxisType) -> Axes:
    """Returns the names of the mesh's axes of the given types."""
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in kinds)


def named_sharding(leaf: Any) -> NamedSharding | None:
    """Returns a sharding over a mesh, or that of an array, a `jax.ShapeDtypeStruct` or a tracer, if it has one."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", leaf)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def mesh_in_use(tree: Any) -> AnyMesh | None:
    """Returns the mesh that `jax.set_mesh` has set, or else the one that the tree's arrays live on, if there is any."""
    if not (context := jax.sharding.get_abstract_mesh()).empty:
        return context
    for leaf in jax.tree.leaves(tree):
        if (sharding := named_sharding(leaf)) is not None:
            return sharding.mesh
    return None


def names_of(sharding: NamedSharding | PartitionSpec, ndim: int) -> Spec:
    """Returns the names of the mesh axes that divide each of an array's axes."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    entries = [(entry,) if isinstance(entry, str) else entry if isinstance(entry, tuple) else () for entry in spec]
    return (*entries, *((),) * (ndim - len(entries)))


def typed_spec(leaf: Any) -> Spec:
    """Returns the explicit mesh axes that divide each axis of an array, read from its type."""
    if (sharding := named_sharding(leaf)) is None:
        return ()
    typed = _typed_axes.get()
    typed = axes_of_type(sharding.mesh, AxisType.Explicit) if typed is None else typed
    names = names_of(sharding.spec, len(leaf.shape))
    return tuple(tuple(name for name in of_axis if name in typed) for of_axis in names)


def reshard(tree: Any, like: Any, spec: PartitionSpec | None = None) -> Any:
    """Returns arrays with the shardings that others carry in their types; no mesh need be set.

    Args:
      tree: the arrays.
      like: a tree like it, whose arrays' types tell the meshes. Where one is not sharded, the array stays as it is.
      spec: for all others, in place of their own shardings; None for these.
    """
    arrays, structure = jax.tree.flatten(tree)
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(like)]
    moved = [
        jax.sharding.reshard(array, NamedSharding(s.mesh, s.spec if spec is None else spec)) if any(s.spec) else array
        for array, s in zip(arrays, shardings, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


@contextlib.contextmanager
def only_typed(axes: Axes) -> Iterator[None]:
    """Within the context, `typed_spec` tells of these axes alone: `state_shardings` makes all explicit for a trace."""
    token = _typed_axes.set(axes)
    try:
        yield
    finally:
        _typed_axes.reset(token)

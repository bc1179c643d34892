"""Functions of each device's part of an array, and functions that the compiler partitions."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from rootfree_optax._src.common.compiled import Static, take_arrays
from rootfree_optax._src.mesh.state_shardings import AnyMesh

Axes = tuple[str, ...]


def axes_of_type(mesh: AnyMesh, *kinds: AxisType) -> Axes:
    """Returns the names of the mesh's axes of the given types."""
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in kinds)


def map_shards(mesh: AnyMesh, axes: Axes, function: Callable[..., Any], replicated: int, *arguments: Any) -> Any:
    """Returns `function(*arguments)` of each device's own parts, its results split over the devices likewise.

    Args:
      mesh: the mesh in use.
      axes: what the leading axes of parts and results are split over.
      function: a function of a module, rather than a new one at each call: compiled programs are found by its identity.
      replicated: how many of the first arguments every device has whole: trees of arrays and of hashable values.
      *arguments: trees of arrays, and in the first ones of hashable values.
    """
    static, arrays = take_arrays(arguments[:replicated])
    return _map_shards(mesh, axes, function, static, arrays, arguments[replicated:])


# Compiled even when called outside `jax.jit`: eagerly, jax.shard_map compiles each small operation by itself.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _map_shards(
    mesh: AnyMesh, axes: Axes, function: Callable[..., Any], static: Static, arrays: list[jax.Array], parts: Any
) -> Any:
    spec = PartitionSpec(axes)
    return jax.shard_map(
        # The arrays are arguments: on explicit axes they could not be closed over.
        lambda arrays, parts: function(*static.insert(arrays), *parts),
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        axis_names=set(axes_of_type(mesh, AxisType.Auto, AxisType.Explicit)),
        check_vma=False,  # nothing is the same over `axes`, and what is over other axes is so by construction
    )(arrays, parts)


def partition(
    mesh: AnyMesh, function: Callable[..., tuple[jax.Array, ...]], specs: Sequence[PartitionSpec], *arguments: Any
) -> tuple[jax.Array, ...]:
    """Returns the arrays of a function that the compiler partitions.

    Args:
      mesh: the mesh in use.
      function: what makes the arrays; within it no array has a sharding in its type.
      specs: the shardings that they get in their types, if the mesh has explicit axes.
      *arguments: of the function.
    """
    explicit = axes_of_type(mesh, AxisType.Explicit)
    if not explicit:
        return function(*arguments)
    has_context = not jax.sharding.get_abstract_mesh().empty
    with contextlib.nullcontext() if has_context else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shardings = tuple(_restrict(spec, explicit) for spec in specs)
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)(*arguments)


def _restrict(spec: PartitionSpec, axes: Axes) -> PartitionSpec:
    """Returns a sharding over some of its mesh axes alone."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return PartitionSpec(*(tuple(name for name in names if name in axes) for names in entries))

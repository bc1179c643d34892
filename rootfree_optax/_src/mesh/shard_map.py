"""Functions of each device's part of an array, and functions that the compiler partitions."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rootfree_optax._src.common.compiled import Static, take_arrays
from rootfree_optax._src.common.meshes import AnyMesh, Axes, axes_of_type, names_of


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
    # The arrays are arguments: on explicit axes they could not be closed over.
    on_arrays = lambda arrays, parts: function(*static.insert(arrays), *parts)
    return on_each_device(mesh, on_arrays, (PartitionSpec(), spec), spec)(arrays, parts)


def on_each_device(mesh: AnyMesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `jax.shard_map` of a function over all axes of the mesh in use that are not mapped yet."""
    return jax.shard_map(
        function,
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(axes_of_type(mesh, AxisType.Auto, AxisType.Explicit)),
        check_vma=False,  # what is the same over some axes is so by construction
    )


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
    return PartitionSpec(*(tuple(name for name in names if name in axes) for names in names_of(spec, len(spec))))


def place(mesh: AnyMesh, array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns an array with a sharding in its type, as far as the mesh has explicit axes."""
    if not (explicit := axes_of_type(mesh, AxisType.Explicit)):
        return array
    context = jax.sharding.get_abstract_mesh()
    return jax.sharding.reshard(array, NamedSharding(mesh if context.empty else context, _restrict(spec, explicit)))

"""What runs over a mesh: functions of each device's part of an array, and arrays on their way between shardings."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout.split import Cut
from rootfree_optax._src.mesh.state_shardings import AnyMesh

Axes = tuple[str, ...]
_ARRAY = object()


def axes_of_type(mesh: AnyMesh, *kinds: AxisType) -> Axes:
    """Returns the names of the mesh's axes of the given types."""
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in kinds)


@dataclasses.dataclass(frozen=True)
class _Static:
    """A tree whose arrays are taken out, to be put in again."""

    structure: Any
    values: tuple[Any, ...]  # _ARRAY where an array was

    def with_arrays(self, arrays: Sequence[jax.Array]) -> Any:
        """Returns the tree."""
        remaining = iter(arrays)
        leaves = [next(remaining) if value is _ARRAY else value for value in self.values]
        return jax.tree.unflatten(self.structure, leaves)


def on_shards(mesh: AnyMesh, axes: Axes, function: Callable[..., Any], shared: Any, *parts: Any) -> Any:
    """Returns `function(shared, *parts)` of each device's own parts, its results split over the devices likewise.

    Args:
      mesh: the mesh in use.
      axes: what the leading axes of parts and results are split over.
      function: a function of a module, not a new one at each call: by its identity compiled programs are found.
      shared: a tree of arrays that every device has, and of hashable values.
      *parts: trees of arrays.
    """
    leaves, structure = jax.tree.flatten(shared)
    values = tuple(_ARRAY if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves)
    arrays = [leaf for leaf, value in zip(leaves, values, strict=True) if value is _ARRAY]
    return _on_shards(mesh, axes, function, _Static(structure, values), arrays, parts)


# Compiled even when called outside `jax.jit`: eagerly, jax.shard_map compiles each small operation by itself.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _on_shards(
    mesh: AnyMesh, axes: Axes, function: Callable[..., Any], static: _Static, arrays: list[jax.Array], parts: Any
) -> Any:
    spec = PartitionSpec(axes)
    return jax.shard_map(
        # The arrays as arguments, not closed over: those on explicit axes could not be.
        lambda arrays, parts: function(static.with_arrays(arrays), *parts),
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        axis_names=set(axes_of_type(mesh, AxisType.Auto, AxisType.Explicit)),
        check_vma=False,  # nothing is the same over `axes`, and what is over other axes is so by construction
    )(arrays, parts)


def partitioned(
    mesh: AnyMesh, function: Callable[..., tuple[jax.Array, ...]], specs: Sequence[PartitionSpec], *arguments: Any
) -> tuple[jax.Array, ...]:
    """Returns arrays of a function that the compiler partitions.

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
        shardings = tuple(_restricted(spec, explicit) for spec in specs)
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)(*arguments)


def _restricted(spec: PartitionSpec, axes: Axes) -> PartitionSpec:
    """Returns a sharding over some of its mesh axes alone."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return PartitionSpec(*(tuple(name for name in names if name in axes) for names in entries))


def route(mesh: AnyMesh, axes: Axes, shape: Shape) -> list[PartitionSpec]:
    """Returns the shardings that a stack takes one after another, until its leading axis is split over `axes`.

    The compiler exchanges what splits one axis for what splits another, and everything else by gathering the whole.

    Args:
      mesh: the mesh in use.
      axes: of the mesh.
      shape: of the stack, whose first axis counts blocks.
    """
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if sum(size > 1 for size in mesh.shape.values()) <= 1:
        return [PartitionSpec(axes)]
    within = next((dim for dim, length in enumerate(shape[1:], 1) if length % shards == 0), None)
    return [*([] if within is None else [_split_only(within, axes)]), PartitionSpec(axes)]


def split_within_blocks(mesh: AnyMesh, axes: Axes, array: jax.Array, cuts: Sequence[Cut], first: int) -> jax.Array:
    """Returns a tensor, or blocks cut from it, split within blocks, so that cutting and merging stay on each device.

    Which of the tensor's axes is split must be known from the cuts alone: one of which each device's part lies within a
    block, or is made of blocks, and of which the blocks divide in turn. If there is none, the compiler decides.

    Args:
      mesh: the mesh in use.
      axes: what the array is split over.
      array: [*layers, *lengths] or [*layers, *counts, *block].
      cuts: of the lengths.
      first: the axis of the array that is the first of the lengths or of the block.
    """
    shards = math.prod(mesh.shape[axis] for axis in axes)
    fits = lambda cut: len(cut.runs) == 1 and cut.piece % shards == 0 and shards % cut.runs[0].count == 0
    # Of a whole axis every device's part is within the block already.
    within = (
        min((cut.runs[0].count, index) for index, cut in enumerate(cuts) if fits(cut)) if any(map(fits, cuts)) else None
    )
    return array if within is None else move(mesh, array, [_split_only(first + within[1], axes)])


def _split_only(dim: int, axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(None for _ in range(dim)), axes)


def move(mesh: AnyMesh, array: jax.Array, stops: Sequence[PartitionSpec]) -> jax.Array:
    """Returns an array after it has taken the given shardings one after another; within `partitioned`."""
    context = jax.sharding.get_abstract_mesh()
    for spec in stops:
        array = jax.lax.with_sharding_constraint(array, NamedSharding(mesh if context.empty else context, spec))
    return array


def replicated(tree: Any) -> Any:
    """Replicates arrays that carry a sharding in their type: blocks are cut across its boundaries."""

    def replicate(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        return leaf if all(axis is None for axis in spec) else jax.sharding.reshard(leaf, PartitionSpec())

    return jax.tree.map(replicate, tree)


def sharded_like(tree: Any, reference: Any) -> Any:
    """Gives arrays the shardings that others carry in their types."""

    def shard(leaf: jax.Array, like: jax.Array) -> jax.Array:
        spec = jax.typeof(like).sharding.spec
        return leaf if all(axis is None for axis in spec) else jax.sharding.reshard(leaf, spec)

    return jax.tree.map(shard, tree, reference)

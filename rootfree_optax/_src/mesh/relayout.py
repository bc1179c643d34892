"""Arrays on their way between shardings."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rootfree_optax._src.common.meshes import AnyMesh, Axes
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout.split import Cut


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
    fitting = [(cut.runs[0].count, index) for index, cut in enumerate(cuts) if fits(cut)]
    if not fitting:
        return array
    _, within = min(fitting)  # of a whole axis every device's part is within the block already
    return move(mesh, array, [_split_only(first + within, axes)])


def _split_only(dim: int, axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(None for _ in range(dim)), axes)


def move(mesh: AnyMesh, array: jax.Array, stops: Sequence[PartitionSpec]) -> jax.Array:
    """Returns an array after it has taken the given shardings one after another; within `partition`."""
    context = jax.sharding.get_abstract_mesh()
    for spec in stops:
        array = jax.lax.with_sharding_constraint(array, NamedSharding(mesh if context.empty else context, spec))
    return array

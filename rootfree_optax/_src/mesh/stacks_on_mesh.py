"""A plan whose stacks are split over axes of a mesh: every device has whole blocks, and works on its own.

The number of blocks of a stack is padded to a multiple of the number of devices, by blocks of zero gradient whose
factors start at the identity. Gradients come in as the user sharded them. They are cut into blocks, and the blocks
sent to the devices that own them; directions go back the same way. In between, in `jax.shard_map`, nothing is sent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from rootfree_optax._src.common import trees
from rootfree_optax._src.layout import Layout, Plan
from rootfree_optax._src.layout.split import RelayoutFn
from rootfree_optax._src.layout.stack import Stack, padded_lengths
from rootfree_optax._src.layout.unit import no_relayout
from rootfree_optax._src.mesh import partition
from rootfree_optax._src.mesh.state_shardings import AnyMesh, mesh_in_use

BlockAxes: TypeAlias = str | tuple[str, ...] | None


def require_block_axes(block_axes: Any) -> None:
    """Raises a TypeError for anything but None, a name or a tuple of names, a ValueError for an empty or double one."""
    names = (block_axes,) if isinstance(block_axes, str) else block_axes
    if names is None:
        return
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"block_axes must be the name of a mesh axis, a tuple of names, or None, got {block_axes!r}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"block_axes must name at least one mesh axis and none twice, got {block_axes!r}.")


@dataclasses.dataclass(frozen=True)
class ShardedPlan:
    """A plan and where its stacks are.

    Args:
      plan: the plan.
      lengths: of each stack's arrays, at least its count; what is beyond are padding blocks.
      axes: the mesh axes that the stacks are split over; without any, nothing is constrained.
      mesh: the mesh that has them.
    """

    plan: Plan
    lengths: tuple[int, ...]
    axes: tuple[str, ...] = ()
    mesh: AnyMesh | None = None

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The plan's stacks."""
        return self.plan.stacks

    @property
    def shards(self) -> int:
        """How many parts each stack is split into."""
        return math.prod(self._mesh.shape[axis] for axis in self.axes) if self.axes else 1

    @property
    def is_local(self) -> bool:
        """Whether arrays are a device's own parts already, because the caller is inside `jax.shard_map`."""
        return bool(self.axes) and set(self.axes) <= set(partition.axes_of_type(self._mesh, AxisType.Manual))

    @property
    def _mesh(self) -> AnyMesh:
        assert self.mesh is not None
        return self.mesh

    def on_shards(self, function: Callable[..., Any], shared: Any, *parts: Any) -> Any:
        """Returns `function(shared, *parts)`, see `partition.on_shards`; for the whole arrays if nothing is split."""
        if not self.axes or self.is_local:
            return function(shared, *parts)
        return partition.on_shards(self._mesh, self.axes, function, shared, *parts)

    def anchor(self, params: Any) -> jax.Array:
        """Returns an array without entries, made of a parameter if these are traced.

        What depends on no argument of a `jax.jit` outside `jax.set_mesh` would be compiled for a single device.
        """
        first = next(iter(jax.tree.leaves(params)), None)
        if not self.axes or self.is_local or not isinstance(first, jax.core.Tracer):
            return jnp.zeros([0])
        without_entries = lambda leaf: (jnp.ravel(leaf)[:0],)
        [empty] = partition.partitioned(self._mesh, without_entries, [PartitionSpec()], first)
        return empty

    def pack(self, tree: Any, name: str, *, sample_axis: bool = False) -> tuple[jax.Array, ...]:
        """Returns the stacks of a tree like the parameters, [length, *shape], split over the axes.

        Args:
          tree: arrays of the parameters' shapes.
          name: what the tree is called in an error.
          sample_axis: whether every array has one more, leading axis; then stacks are [length, samples, *shape].
        """
        if not self.axes:
            return _whole_stacks(self, tree, name, sample_axis)
        if self.is_local:
            return tuple(map(self._own_part, self.blocks(partition.replicated(tree), name, sample_axis)))
        return _to_stacks(self, tree, name, sample_axis)

    def unpack(self, stacks: Sequence[jax.Array], like: Any) -> Any:
        """Returns the tree whose blocks are given, with the dtypes and shardings of `like`: the inverse of `pack`."""
        if not self.axes:
            return partition.sharded_like(self.tree(stacks, like), like)
        if self.is_local:
            return partition.sharded_like(self.tree([self._all_parts(stack) for stack in stacks], like), like)
        return _from_stacks(self, tuple(stacks), like)

    def blocks(self, tree: Any, name: str, sample_axis: bool) -> tuple[jax.Array, ...]:
        """Returns what `pack` does, whole."""
        pack = functools.partial(self.plan.pack, name=name, relayout=self._relayout)
        stacks = jax.vmap(pack, out_axes=1)(tree) if sample_axis else pack(tree)
        return tuple(map(_padded, stacks, self.lengths))

    def tree(self, stacks: Sequence[jax.Array], like: Any) -> Any:
        """Returns what `unpack` does, of whole stacks."""
        own = [array[: stack.count] for array, stack in zip(stacks, self.stacks, strict=True)]
        return self.plan.unpack(own, like, equal_kernels=not self.axes)

    @property
    def _relayout(self) -> RelayoutFn:
        if not self.axes or self.is_local:
            return no_relayout
        return functools.partial(partition.split_within_blocks, self._mesh, self.axes)

    def _own_part(self, stack: jax.Array) -> jax.Array:
        length = stack.shape[0] // self.shards
        return jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(self.axes) * length, length)

    def _all_parts(self, part: jax.Array) -> jax.Array:
        """Returns the stack of all parts, by a sum: that is typed as equal on all devices, what is gathered is not."""
        length = part.shape[0]
        zeros = jnp.zeros((length * self.shards, *part.shape[1:]), part.dtype)
        start = jax.lax.axis_index(self.axes) * length
        return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, part, start, 0), self.axes)


def _padded(stack: jax.Array, length: int) -> jax.Array:
    padding = length - stack.shape[0]
    return jnp.pad(stack, [(0, padding)] + [(0, 0)] * (stack.ndim - 1)) if padding else stack


# These are compiled even when called outside `jax.jit`: arrays that are cut across shards, one small operation after
# another, would be laid out anew each time. The first is called from several branches, and is in the program once.


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _whole_stacks(plan: ShardedPlan, tree: Any, name: str, sample_axis: bool) -> tuple[jax.Array, ...]:
    return plan.blocks(partition.replicated(tree), name, sample_axis)


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _to_stacks(plan: ShardedPlan, tree: Any, name: str, sample_axis: bool) -> tuple[jax.Array, ...]:
    def to_stacks(tree: Any) -> tuple[jax.Array, ...]:
        blocks = plan.blocks(tree, name, sample_axis)
        return tuple(
            partition.move(plan._mesh, stack, partition.route(plan._mesh, plan.axes, stack.shape)) for stack in blocks
        )

    return partition.partitioned(plan._mesh, to_stacks, [PartitionSpec(plan.axes)] * len(plan.stacks), tree)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _from_stacks(plan: ShardedPlan, stacks: tuple[jax.Array, ...], like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)

    def to_leaves(stacks: tuple[jax.Array, ...], like: Any) -> tuple[jax.Array, ...]:
        # Without its last stop, where the stacks are, and backwards.
        stops = [partition.route(plan._mesh, plan.axes, stack.shape)[-2::-1] for stack in stacks]
        whole = [partition.move(plan._mesh, stack, back) for stack, back in zip(stacks, stops, strict=True)]
        pairs = zip(jax.tree.leaves(plan.tree(whole, like)), jax.tree.leaves(like), strict=True)
        # Where a gradient is NaN its direction is. Saying so changes nothing, but is an operation on both, entry by
        # entry: so the compiler lays the one out as the other.
        return tuple(jax.lax.select(jnp.isnan(other), other, leaf) for leaf, other in pairs)

    specs = [jax.typeof(leaf).sharding.spec for leaf in leaves]
    return jax.tree.unflatten(structure, partition.partitioned(plan._mesh, to_leaves, specs, stacks, like))


def for_parameters(plan: Plan, block_axes: BlockAxes, params: optax.Params) -> ShardedPlan:
    """Returns the plan over the mesh in use when a state is made of parameters.

    Raises:
      ValueError: if there is no mesh with the axes.
    """
    sharded = _over_mesh(plan, block_axes, params)
    return dataclasses.replace(sharded, lengths=_divisible(plan, sharded.shards))


def for_state(
    layout: Layout, block_axes: BlockAxes, factors: Any, updates: optax.Updates, params: optax.Params | None
) -> ShardedPlan:
    """Returns the plan over the mesh in use when a state is updated; its arrays tell how many blocks are padding.

    Raises:
      ValueError: if there is no mesh with the axes, or the state is not of such parameters, layout and mesh.
    """
    plan = layout.plan(updates if params is None else params)
    if not plan.stacks:
        return ShardedPlan(plan, ())
    sharded = _over_mesh(plan, block_axes, (factors, updates))
    shards = sharded.shards
    shapes = [jnp.shape(part) for part in jax.tree.leaves(factors)]
    whole = [(length * shards, *shape) for length, *shape in shapes] if sharded.is_local else shapes
    lengths = padded_lengths(plan.stacks, whole)
    fits = lengths is not None and (block_axes is not None or lengths == sharded.lengths)
    # A parameter without a gradient is not planned for then, and its blocks could pass for padding.
    if params is None and (block_axes is not None or not fits) and trees.has_none(updates):
        raise ValueError("params must be given where a gradient is None: call tx.update(grads, state, params).")
    if lengths is None or not fits:
        expected = [shape for stack in plan.stacks for shape in stack.part_shapes]
        raise ValueError(
            "the state must come from init on parameters of the shapes that update is given, with the same layout. "
            f"The factors' arrays have the shapes {whole}, but the layout asks for {expected}, and padding if need be."
        )
    if shards > 1 and lengths != (even := _divisible(plan, shards)):
        raise ValueError(
            f"the state's stacks must have {even} blocks on the {shards} devices of block_axes={block_axes!r}, got "
            f"{lengths}: it is of another mesh or other parameters. Restore it for this one as README says."
        )
    return dataclasses.replace(sharded, lengths=lengths)


def _divisible(plan: Plan, shards: int) -> tuple[int, ...]:
    """Returns how many blocks each stack has with its padding."""
    return tuple(-(-stack.count // shards) * shards for stack in plan.stacks)


def _over_mesh(plan: Plan, block_axes: BlockAxes, tree: Any) -> ShardedPlan:
    counts = tuple(stack.count for stack in plan.stacks)
    if block_axes is None or not plan.stacks:
        return ShardedPlan(plan, counts)
    axes = (block_axes,) if isinstance(block_axes, str) else block_axes
    mesh = mesh_in_use(tree)
    if mesh is None or not set(axes) <= set(mesh.axis_names):
        found = "there is none" if mesh is None else f"the one in use has the axes {mesh.axis_names}"
        raise ValueError(
            f"block_axes={block_axes!r} needs a mesh with these axes, but {found}. Call init and update within "
            "`with jax.set_mesh(mesh):`, or place parameters and gradients on the mesh with jax.NamedSharding."
        )
    manual = set(axes) & set(partition.axes_of_type(mesh, AxisType.Manual))
    if manual and manual != set(axes):
        raise ValueError(f"block_axes must be all mapped by jax.shard_map or none, got {axes}, mapped: {manual}.")
    return ShardedPlan(plan, counts, axes, mesh)

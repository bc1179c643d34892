"""Where the stacks of a plan are: whole, divided over axes of a mesh, or one device's own parts.

Divided, every device has whole blocks, and works on its own. The number of blocks of a stack is padded to a multiple of
the number of devices, by blocks of zero gradient. Gradients come in as the user sharded them. They are cut into blocks,
and the blocks sent to the devices that own them; directions go back the same way. In between, in `jax.shard_map`,
nothing is sent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from rootfree_optax._src.layout import Plan
from rootfree_optax._src.layout.split import RelayoutFn
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.layout.unit import no_relayout
from rootfree_optax._src.mesh.relayout import move, reshard, route, split_within_blocks
from rootfree_optax._src.mesh.shard_map import Axes, axes_of_type, map_shards, partition
from rootfree_optax._src.mesh.state_shardings import AnyMesh, mesh_in_use

MeshAxes: TypeAlias = str | tuple[str, ...] | None
Stacks: TypeAlias = tuple[jax.Array, ...]


def require_mesh_axes(mesh_axes: Any) -> None:
    """Raises a TypeError for anything but None, a name or a tuple of names, a ValueError for an empty or double one."""
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    if names is None:
        return
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"mesh_axes must be the name of a mesh axis, a tuple of names, or None, got {mesh_axes!r}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"mesh_axes must name at least one mesh axis and none twice, got {mesh_axes!r}.")


@dataclasses.dataclass(frozen=True)
class WholeStacks:
    """Stacks that every device has whole.

    Args:
      plan: the plan.
      lengths: of each stack's arrays.
      axes: the mesh axes that the stacks are divided over.
    """

    plan: Plan
    lengths: tuple[int, ...]
    axes: Axes = ()

    @property
    def shards(self) -> int:
        """How many parts each stack is divided into."""
        return 1

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The plan's stacks."""
        return self.plan.stacks

    @property
    def own_lengths(self) -> tuple[int, ...]:
        """The lengths of the arrays that `on_shards` gives its function."""
        return tuple(length // self.shards for length in self.lengths)

    @property
    def local_axes(self) -> Axes:
        """The mesh axes over which arrays are one device's own parts already."""
        return ()

    def anchor(self, params: Any) -> jax.Array:
        """Returns an array without entries for a function to depend on when it depends on nothing else."""
        del params
        return jnp.zeros([0])

    def on_shards(self, function: Callable[..., Any], replicated: int = 1) -> Callable[..., Any]:
        """Returns a function of whole stacks for one of each device's own parts.

        Args:
          function: a function of a module. Its results are split as its arguments are.
          replicated: how many of its first arguments every device has whole: trees of arrays and of hashable values.
        """
        del replicated
        return function

    def pack(self, tree: Any, name: str, *, sample_axis: bool = False) -> Stacks:
        """Returns the stacks of a tree like the parameters, [length, *shape].

        Args:
          tree: arrays of the parameters' shapes.
          name: what the tree is called in an error.
          sample_axis: whether every array has one more, leading axis; then stacks are [length, samples, *shape].
        """
        return _pack_whole(self.plan, tree, name, sample_axis)

    def unpack(self, stacks: Sequence[jax.Array], like: Any, rest: Mapping[str, Any] | None = None) -> Any:
        """Returns the tree whose blocks are given, with the dtypes and shardings of `like`: the inverse of `pack`.

        Args:
          stacks: [length, *shape] for each stack.
          like: the tree that was packed.
          rest: the arrays of the parameters without factors, by key path.
        """
        return _shard_like(self.plan.unpack(stacks, like, rest=rest, equal_kernels=True), like)


@dataclasses.dataclass(frozen=True)
class DividedStacks(WholeStacks):
    """Stacks that are divided over axes of a mesh.

    Args:
      plan: the plan.
      lengths: of each stack's arrays, at least its count; blocks beyond the count are padding.
      axes: the mesh axes that the stacks are divided over.
      mesh: the mesh that has them.
    """

    mesh: AnyMesh = dataclasses.field(kw_only=True)

    @property
    def shards(self) -> int:
        """How many parts each stack is divided into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def anchor(self, params: Any) -> jax.Array:
        """Returns an array without entries, made of a parameter if these are traced.

        What depends on no argument of a `jax.jit` outside `jax.set_mesh` would be compiled for a single device.
        """
        first = next(iter(jax.tree.leaves(params)), None)
        if not isinstance(first, jax.core.Tracer):
            return jnp.zeros([0])
        [empty] = partition(self.mesh, lambda leaf: (jnp.ravel(leaf)[:0],), [PartitionSpec()], first)
        return empty

    def on_shards(self, function: Callable[..., Any], replicated: int = 1) -> Callable[..., Any]:
        """Returns a function of whole stacks for one of each device's own parts, see `map_shards`."""
        return functools.partial(map_shards, self.mesh, self.axes, function, replicated)

    def pack(self, tree: Any, name: str, *, sample_axis: bool = False) -> Stacks:
        """Returns the stacks of a tree like the parameters, divided over the axes."""
        return _pack_divided(self, tree, name, sample_axis)

    def unpack(self, stacks: Sequence[jax.Array], like: Any, rest: Mapping[str, Any] | None = None) -> Any:
        """Returns the tree whose blocks are given: the inverse of `pack`."""
        return _unpack_divided(self, tuple(stacks), like, rest)

    def _pack_padded(self, tree: Any, name: str, sample_axis: bool, relayout: RelayoutFn = no_relayout) -> Stacks:
        stacks = _pack(self.plan, tree, name, sample_axis, relayout)
        return tuple(_pad(stack, length) for stack, length in zip(stacks, self.lengths, strict=True))

    def _unpack_padded(self, stacks: Sequence[jax.Array], like: Any, rest: Mapping[str, Any] | None) -> Any:
        own = [array[: stack.count] for array, stack in zip(stacks, self.stacks, strict=True)]
        return self.plan.unpack(own, like, rest=rest)


@dataclasses.dataclass(frozen=True)
class LocalStacks(DividedStacks):
    """One device's own parts of divided stacks: the caller is inside `jax.shard_map` over the axes."""

    @property
    def local_axes(self) -> Axes:
        """The mesh axes that the stacks are divided over."""
        return self.axes

    def anchor(self, params: Any) -> jax.Array:
        """Returns an array without entries."""
        return WholeStacks.anchor(self, params)

    def on_shards(self, function: Callable[..., Any], replicated: int = 1) -> Callable[..., Any]:
        """Returns the function: its arguments are this device's own parts."""
        del replicated
        return function

    def pack(self, tree: Any, name: str, *, sample_axis: bool = False) -> Stacks:
        """Returns this device's parts of the stacks."""
        index = jax.lax.axis_index(self.axes)
        pairs = zip(self._pack_padded(_replicate(tree), name, sample_axis), self.own_lengths, strict=True)
        return tuple(jax.lax.dynamic_slice_in_dim(stack, index * length, length) for stack, length in pairs)

    def unpack(self, stacks: Sequence[jax.Array], like: Any, rest: Mapping[str, Any] | None = None) -> Any:
        """Returns the whole tree, on every device."""
        return _shard_like(self._unpack_padded([self._sum_parts(part) for part in stacks], like, rest), like)

    def _sum_parts(self, part: jax.Array) -> jax.Array:
        """Returns the stack of all parts. Uses psum because its result is typed as replicated; all_gather's is not."""
        length = part.shape[0]
        zeros = jnp.zeros((length * self.shards, *part.shape[1:]), part.dtype)
        start = jax.lax.axis_index(self.axes) * length
        return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, part, start, 0), self.axes)


def _replicate(tree: Any) -> Any:
    """Replicates arrays that carry a sharding in their type: blocks are cut across its boundaries."""
    return jax.tree.map(lambda leaf: reshard(leaf, leaf, PartitionSpec()), tree)


def _shard_like(tree: Any, reference: Any) -> Any:
    """Gives arrays the shardings that others carry in their types."""
    return jax.tree.map(lambda leaf, like: reshard(leaf, like, _spec(like)), tree, reference)


def _spec(leaf: jax.Array) -> PartitionSpec:
    return jax.typeof(leaf).sharding.spec


def _pack(plan: Plan, tree: Any, name: str, sample_axis: bool, relayout: RelayoutFn = no_relayout) -> Stacks:
    pack = lambda tree: plan.pack(tree, name, relayout)
    return jax.vmap(pack, out_axes=1)(tree) if sample_axis else pack(tree)


def _pad(stack: jax.Array, length: int) -> jax.Array:
    padding = length - stack.shape[0]
    return jnp.pad(stack, [(0, padding)] + [(0, 0)] * (stack.ndim - 1)) if padding else stack


# These are compiled even when called outside `jax.jit`: arrays that are cut across shards, one small operation after
# another, would be laid out anew each time. The first is called from several branches, and is in the program once.


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _pack_whole(plan: Plan, tree: Any, name: str, sample_axis: bool) -> Stacks:
    return _pack(plan, _replicate(tree), name, sample_axis)


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _pack_divided(divided: DividedStacks, tree: Any, name: str, sample_axis: bool) -> Stacks:
    mesh, axes = divided.mesh, divided.axes

    def to_stacks(tree: Any) -> Stacks:
        relayout = functools.partial(split_within_blocks, mesh, axes)
        stacks = divided._pack_padded(tree, name, sample_axis, relayout)
        return tuple(move(mesh, stack, route(mesh, axes, stack.shape)) for stack in stacks)

    return partition(mesh, to_stacks, [PartitionSpec(axes)] * len(divided.stacks), tree)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _unpack_divided(divided: DividedStacks, stacks: Stacks, like: Any, rest: Mapping[str, Any] | None) -> Any:
    mesh = divided.mesh
    leaves, structure = jax.tree.flatten(like)

    def to_leaves(stacks: Stacks, like: Any, rest: Mapping[str, Any] | None) -> tuple[jax.Array, ...]:
        # The stops of `_pack_divided` backwards, without the last, where the stacks are.
        stops = [route(mesh, divided.axes, stack.shape)[-2::-1] for stack in stacks]
        whole = [move(mesh, stack, back) for stack, back in zip(stacks, stops, strict=True)]
        pairs = zip(jax.tree.leaves(divided._unpack_padded(whole, like, rest)), jax.tree.leaves(like), strict=True)
        # Where a gradient is NaN its direction is. Saying so changes nothing, but is an operation on both, entry by
        # entry: so the compiler lays out the one as the other.
        return tuple(jax.lax.select(jnp.isnan(other), other, leaf) for leaf, other in pairs)

    specs = [_spec(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, partition(mesh, to_leaves, specs, stacks, like, rest))


def place_stacks(plan: Plan, mesh_axes: MeshAxes, tree: Any) -> WholeStacks | DividedStacks:
    """Returns where the stacks of a plan are, on the mesh in use.

    Args:
      plan: the plan, with at least one stack.
      mesh_axes: what the stacks are divided over; None divides nothing.
      tree: arrays that tell which mesh is in use.

    Raises:
      ValueError: if there is no mesh with the axes.
    """
    counts = tuple([stack.count for stack in plan.stacks])
    if mesh_axes is None:
        return WholeStacks(plan, counts)
    axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    mesh = mesh_in_use(tree)
    if mesh is None or not set(axes) <= set(mesh.axis_names):
        found = "there is none" if mesh is None else f"the one in use has the axes {mesh.axis_names}"
        raise ValueError(
            f"mesh_axes={mesh_axes!r} needs a mesh with these axes, but {found}. Call init and update within "
            "`with jax.set_mesh(mesh):`, or place parameters and gradients on the mesh with jax.NamedSharding."
        )
    manual = set(axes) & set(axes_of_type(mesh, AxisType.Manual))
    if manual and manual != set(axes):
        raise ValueError(f"mesh_axes must be all mapped by jax.shard_map or none, got {axes}, mapped: {manual}.")
    regime = LocalStacks if manual else DividedStacks
    shards = regime(plan, counts, axes, mesh=mesh).shards
    even = tuple(-(-count // shards) * shards for count in counts)
    return regime(plan, even, axes, mesh=mesh)

"""Where the stacks of a plan are: whole, divided over axes of a mesh, or one device's own parts.

Divided, every device has whole blocks, and works on its own. The number of blocks of a stack is padded to a multiple of
the number of devices, by blocks of zero gradient. Gradients come in as the user sharded them. They are cut into blocks,
and the blocks sent to the devices that own them; directions go back the same way. In between, in `jax.shard_map`,
nothing is sent. How the gradients are sharded is known where the layout was told, or the types say so: then a block
belongs to one of its holders, see `holders.py`. Elsewhere the compiler decides what is sent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from rootfree_optax._src.common.meshes import AnyMesh, Axes, Spec, axes_of_type, mesh_in_use, reshard
from rootfree_optax._src.layout import Plan
from rootfree_optax._src.layout.split import RelayoutFn
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.layout.unit import no_relayout
from rootfree_optax._src.mesh.holders import Holders, find_holders
from rootfree_optax._src.mesh.relayout import move, route, split_within_blocks
from rootfree_optax._src.mesh.shard_map import map_shards, on_each_device, partition, place

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

    @property
    def holders(self) -> Holders | None:
        """How blocks are divided among the devices that hold a part of them; None where they are not."""
        return None

    def numbers(self, stack: int) -> jax.Array:
        """Returns the number of each of a device's own blocks in a stack of the plan, −1 for padding.

        Within what `on_shards` returns.
        """
        return _padded_numbers(jnp.arange(self.lengths[stack]), self.stacks[stack].count)

    def anchor(self, params: Any) -> jax.Array:
        """Returns a zero for a function to depend on when it depends on nothing else."""
        del params
        return jnp.zeros([])

    def on_shards(self, function: Callable[..., Any], replicated: int = 1) -> Callable[..., Any]:
        """Returns a function of whole stacks that calls `function` on each device's own parts.

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
        return reshard(self.plan.unpack(stacks, like, rest=rest, equal_kernels=True), like)


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
    def holders(self) -> Holders | None:
        """How blocks are divided among the devices that hold a part of them; None where they are not."""
        return find_holders(self.plan, tuple((axis, self.mesh.shape[axis]) for axis in self.axes))

    def numbers(self, stack: int) -> jax.Array:
        """Returns the number of each of a device's own blocks in a stack of the plan, −1 for padding."""
        if self.holders is not None:
            return self.holders.numbers(stack)
        length = self.own_lengths[stack]
        first = jax.lax.axis_index(self.axes) * length
        return _padded_numbers(first + jnp.arange(length), self.stacks[stack].count)

    @property
    def shards(self) -> int:
        """How many parts each stack is divided into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def anchor(self, params: Any) -> jax.Array:
        """Returns a zero, made of a parameter if these are traced.

        What depends on no argument of a `jax.jit` outside `jax.set_mesh` would be compiled for a single device. XLA of
        JAX 0.11.2 crashes on an array without entries as an argument of `jax.shard_map`.
        """
        first = next(iter(jax.tree.leaves(params)), None)
        if not isinstance(first, jax.core.Tracer):
            return jnp.zeros([])
        [zero] = partition(self.mesh, lambda leaf: (jnp.sum(jnp.ravel(leaf)[:0]),), [PartitionSpec()], first)
        return zero

    def on_shards(self, function: Callable[..., Any], replicated: int = 1) -> Callable[..., Any]:
        """Returns a function of whole stacks for one of each device's own parts, see `map_shards`."""
        return functools.partial(map_shards, self.mesh, self.axes, function, replicated)

    def pack(self, tree: Any, name: str, *, sample_axis: bool = False) -> Stacks:
        """Returns the stacks of a tree like the parameters, divided over the axes."""
        return _pack_divided(self, tree, name, sample_axis)

    def unpack(self, stacks: Sequence[jax.Array], like: Any, rest: Mapping[str, Any] | None = None) -> Any:
        """Returns the tree whose blocks are given: the inverse of `pack`."""
        return _unpack_divided(self, tuple(stacks), like, rest)


@dataclasses.dataclass(frozen=True)
class HeldStacks(DividedStacks):
    """Divided stacks, each of whose blocks belongs to one of the devices that hold a part of it."""

    @property
    def holders(self) -> Holders:
        """How blocks are divided among the devices that hold a part of them."""
        found = super().holders
        assert found is not None
        return found

    def pack(self, tree: Any, name: str, *, sample_axis: bool = False) -> Stacks:
        """Returns the stacks of a tree like the parameters, divided over the axes."""
        return _pack_held(self, tree, name, sample_axis)

    def unpack(self, stacks: Sequence[jax.Array], like: Any, rest: Mapping[str, Any] | None = None) -> Any:
        """Returns the tree whose blocks are given: the inverse of `pack`."""
        leaves = self.plan.named_leaves(like, "the tree to unpack like")
        given = {path: leaf for path, leaf in leaves.items() if leaf is not None}
        local = {
            path: None if (leaf := given.get(path)) is None else jax.ShapeDtypeStruct(shape, leaf.dtype)
            for unit in self.holders.plan.units
            for path, shape in zip(unit.paths, unit.shapes, strict=True)
        }
        arrays = _unpack_held(self, tuple(stacks), tuple(local.items()))
        if not axes_of_type(self.mesh, AxisType.Explicit):
            # What blocks do not follow is gathered; gradients tell how it was divided.
            follows = lambda path: (
                {name for names in self.holders.specs[path] for name in names} == {*self.mesh.axis_names}
            )
            arrays = {path: array if follows(path) else _lay_out(array, given[path]) for path, array in arrays.items()}
        tree = self.plan.assemble(arrays, like, rest)
        return jax.tree.map(lambda leaf, other: place(self.mesh, leaf, _spec(other)), tree, like)


@dataclasses.dataclass(frozen=True)
class LocalStacks(DividedStacks):
    """One device's own parts of divided stacks: the caller is inside `jax.shard_map` over the axes."""

    @property
    def local_axes(self) -> Axes:
        """The mesh axes that the stacks are divided over."""
        return self.axes

    def anchor(self, params: Any) -> jax.Array:
        """Returns a zero."""
        return WholeStacks.anchor(self, params)

    def on_shards(self, function: Callable[..., Any], replicated: int = 1) -> Callable[..., Any]:
        """Returns the function: its arguments are this device's own parts."""
        del replicated
        return function

    def pack(self, tree: Any, name: str, *, sample_axis: bool = False) -> Stacks:
        """Returns this device's parts of the stacks."""
        stacks = enumerate(_pack(self.plan, reshard(tree, tree, PartitionSpec()), name, sample_axis))
        return tuple(
            [
                stack.at[self.numbers(i)].get(mode="fill", fill_value=0, wrap_negative_indices=False)
                for i, stack in stacks
            ]
        )

    def unpack(self, stacks: Sequence[jax.Array], like: Any, rest: Mapping[str, Any] | None = None) -> Any:
        """Returns the whole tree, on every device."""
        whole = [self._sum_parts(i, part) for i, part in enumerate(stacks)]
        return reshard(self.plan.unpack(whole, like, rest=rest), like)

    def _sum_parts(self, index: int, part: jax.Array) -> jax.Array:
        """Returns the stack of all parts. Uses psum because its result is typed as replicated; all_gather's is not."""
        zeros = jnp.zeros((self.stacks[index].count, *part.shape[1:]), part.dtype)
        placed = zeros.at[self.numbers(index)].set(part, mode="drop", wrap_negative_indices=False)
        return jax.lax.psum(placed, self.axes)


def _padded_numbers(numbers: jax.Array, count: int) -> jax.Array:
    return jnp.where(numbers < count, numbers, -1)


def _spec(leaf: jax.Array) -> PartitionSpec:
    return jax.typeof(leaf).sharding.spec


def _lay_out(direction: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns a direction that the compiler lays out as its gradient.

    Where the gradient is NaN, so is the direction: this changes no value, but makes the compiler lay both out alike.
    """
    return jax.lax.select(jnp.isnan(gradient), gradient, direction)


def _pack(plan: Plan, tree: Any, name: str, sample_axis: bool, relayout: RelayoutFn = no_relayout) -> Stacks:
    pack = functools.partial(plan.pack, name=name, relayout=relayout)
    return jax.vmap(pack, out_axes=1)(tree) if sample_axis else pack(tree)


def _pad(stack: jax.Array, length: int) -> jax.Array:
    padding = length - stack.shape[0]
    return jnp.pad(stack, [(0, padding)] + [(0, 0)] * (stack.ndim - 1)) if padding else stack


# These are compiled even when called outside `jax.jit`: arrays that are cut across shards, one small operation after
# another, would be laid out anew each time. The first is called from several branches, and is in the program once.


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _pack_whole(plan: Plan, tree: Any, name: str, sample_axis: bool) -> Stacks:
    # Replicated, as blocks are cut across the boundaries of shards.
    return _pack(plan, reshard(tree, tree, PartitionSpec()), name, sample_axis)


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _pack_divided(divided: DividedStacks, tree: Any, name: str, sample_axis: bool) -> Stacks:
    mesh, axes = divided.mesh, divided.axes

    def to_stacks(tree: Any) -> Stacks:
        relayout = functools.partial(split_within_blocks, mesh, axes)
        stacks = map(_pad, _pack(divided.plan, tree, name, sample_axis, relayout), divided.lengths)
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
        own = [array[: stack.count] for array, stack in zip(whole, divided.stacks, strict=True)]
        directions = divided.plan.unpack(own, like, rest=rest)
        return tuple(map(_lay_out, jax.tree.leaves(directions), jax.tree.leaves(like)))

    specs = [_spec(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, partition(mesh, to_leaves, specs, stacks, like, rest))


def _to_spec(spec: Spec, sample_axis: bool = False) -> PartitionSpec:
    return PartitionSpec(*((None,) if sample_axis else ()), *(names or None for names in spec))


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _pack_held(held: HeldStacks, tree: Any, name: str, sample_axis: bool) -> Stacks:
    holders, mesh = held.holders, held.mesh
    leaves = held.plan.named_leaves(tree, name, sample_axis=sample_axis)
    given = {path: leaves[path] for path in holders.specs if leaves[path] is not None}
    specs = {path: _to_spec(holders.specs[path], sample_axis) for path in given}

    def to_owners(given: Any) -> Stacks:
        own = {path: given.get(path) for path in holders.specs}
        return holders.to_owners(_pack(holders.plan, own, name, sample_axis), len(held.stacks))

    placed = {path: place(mesh, leaf, specs[path]) for path, leaf in given.items()}
    return on_each_device(mesh, to_owners, (specs,), PartitionSpec(held.axes))(placed)


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def _unpack_held(held: HeldStacks, stacks: Stacks, local: tuple[tuple[str, Any], ...]) -> dict[str, jax.Array]:
    holders = held.holders
    specs = {path: _to_spec(holders.specs[path]) for path, leaf in local if leaf is not None}

    def from_owners(stacks: Stacks) -> dict[str, jax.Array]:
        arrays = holders.plan.unpack(holders.from_owners(stacks), dict(local))
        return {path: leaf for path, leaf in arrays.items() if leaf is not None}

    return on_each_device(held.mesh, from_owners, (PartitionSpec(held.axes),), specs)(stacks)


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
    placed = DividedStacks(plan, counts, axes, mesh=mesh)
    shards, holders = placed.shards, placed.holders
    if holders is None:
        lengths = tuple(-(-count // shards) * shards for count in counts)
    else:
        lengths = tuple(holders.owned(stack) * shards for stack in range(len(counts)))
    regime = LocalStacks if manual else DividedStacks if holders is None else HeldStacks
    return regime(plan, lengths, axes, mesh=mesh)

"""Blocks that follow the shards: each belongs to one of the devices that hold a part of it.

A device cuts its own part of every parameter into fragments: whole blocks where a shard is made of blocks, and parts of
blocks where a block is made of shards. The fragments of one kind, with as many holders in the same arrangement, go to
the blocks' owners by one exchange among each block's holders, and directions come back by another.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rootfree_optax._src.common.meshes import Axes, Spec
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout import Plan
from rootfree_optax._src.layout.shards import carriers, count_shards, keep_nested
from rootfree_optax._src.layout.split import Cut, block_count, block_shape, windows
from rootfree_optax._src.layout.stack import Placement, Stack, widest
from rootfree_optax._src.layout.unit import Unit, without_axes


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """Blocks of one stack that have their holders in one arrangement.

    Attributes:
      stack: of the plan.
      parts: into how many parts each axis of a block is divided.
      count: the number of blocks that a device has a fragment of.
      owned: the number of blocks that a device owns, padding included.
      position: of each device among the holders of its blocks.
      peers: the devices that have different parts of the same blocks.
      copies: the devices that have the same parts of them.
      numbers: for each parameter, the number in the stack of each device's first block, and how far from it the others
        are.
    """

    stack: int
    parts: Shape
    count: int
    owned: int
    position: np.ndarray
    peers: list[list[int]]
    copies: list[list[int]]
    numbers: list[tuple[np.ndarray, np.ndarray]]

    @property
    def holders(self) -> int:
        """How many devices have different parts of a block."""
        return math.prod(self.parts)


class Holders(NamedTuple):
    """How the stacks of a plan are divided among the holders of their blocks.

    Attributes:
      plan: of each device's own part of the parameters; its stacks are the fragments of each kind.
      kinds: those of the first stack first.
      specs: what divides the parameters with factors, by key path.
      axes: the mesh axes that blocks are divided over.
    """

    plan: Plan
    kinds: tuple[Kind, ...]
    specs: dict[str, Spec]
    axes: Axes

    def owned(self, stack: int) -> int:
        """Returns how many blocks of a stack a device owns."""
        return sum([kind.owned for kind in self.kinds if kind.stack == stack])

    def bytes_received(self, itemsizes: Sequence[int]) -> int:
        """Returns how many bytes a device receives in an update, given those of an entry of each stack.

        What it keeps of an exchange is counted, too.
        """
        total = 0
        for kind, fragment in zip(self.kinds, self.plan.stacks, strict=True):
            part = itemsizes[kind.stack] * kind.owned * kind.holders * math.prod(fragment.shape)
            copies = len(kind.copies[0])
            total += part * (2 * (kind.holders > 1) + copies * (copies > 1))
        return total

    def numbers(self, stack: int) -> jax.Array:
        """Returns the numbers of this device's own blocks in the stack, −1 for padding; within `jax.shard_map`."""
        device, own = jax.lax.axis_index(self.axes), []
        for kind in self.kinds:
            if kind.stack == stack:
                held = [jnp.asarray(first)[device] + offsets for first, offsets in kind.numbers]
                own.append(_own_rows(kind, _pad(jnp.concatenate(held), kind, -1), kind.position, device, kind.owned))
        return jnp.concatenate(own)

    def to_owners(self, fragments: Sequence[jax.Array], stacks: int) -> tuple[jax.Array, ...]:
        """Returns each stack's own blocks, [owned, …, *block].

        Args:
          fragments: for each kind, [count, …, *fragment].
          stacks: the number of stacks.
        """
        blocks = [self._send(kind, pieces) for kind, pieces in zip(self.kinds, fragments, strict=True)]
        members = [[b for b, kind in zip(blocks, self.kinds, strict=True) if kind.stack == i] for i in range(stacks)]
        dtypes = [widest([block.dtype for block in of_stack]) for of_stack in members]
        pairs = zip(members, dtypes, strict=True)
        return tuple([jnp.concatenate([block.astype(dtype) for block in of_stack]) for of_stack, dtype in pairs])

    def from_owners(self, blocks: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns each kind's fragments: the inverse of `to_owners`."""
        fragments, starts = [], [0] * len(blocks)
        for kind in self.kinds:
            start = starts[kind.stack]
            starts[kind.stack] += kind.owned
            fragments.append(self._send_back(kind, blocks[kind.stack][start : start + kind.owned]))
        return fragments

    def _send(self, kind: Kind, pieces: jax.Array) -> jax.Array:
        shape = pieces.shape[1:]
        pieces = _pad(pieces, kind, 0)
        if len(kind.copies[0]) > 1:  # what all copies have, each takes its share of
            share = kind.owned * kind.holders
            pieces = _own_rows(kind, pieces, kind.position // kind.holders, jax.lax.axis_index(self.axes), share)
        if kind.holders > 1:
            pieces = jax.lax.all_to_all(pieces, self.axes, 0, 0, axis_index_groups=kind.peers, tiled=True)
        # [*parts, owned, …, *fragment] → [owned, …, part, fragment, part, fragment]
        axes, others = len(kind.parts), len(shape) - len(kind.parts)
        pieces = pieces.reshape(*kind.parts, kind.owned, *shape)
        order = [*range(axes, axes + 1 + others), *_interleave(range(axes), range(axes + 1 + others, pieces.ndim))]
        block = [part * length for part, length in zip(kind.parts, shape[others:], strict=True)]
        return pieces.transpose(order).reshape(kind.owned, *shape[:others], *block)

    def _send_back(self, kind: Kind, blocks: jax.Array) -> jax.Array:
        fragment = [length // part for length, part in zip(blocks.shape[1:], kind.parts, strict=True)]
        axes = len(fragment)
        pieces = blocks.reshape(kind.owned, *_interleave(kind.parts, fragment))
        pieces = pieces.transpose(*range(1, 2 * axes, 2), 0, *range(2, 2 * axes + 1, 2)).reshape(-1, *fragment)
        if kind.holders > 1:
            pieces = jax.lax.all_to_all(pieces, self.axes, 0, 0, axis_index_groups=kind.peers, tiled=True)
        if len(kind.copies[0]) > 1:
            pieces = jax.lax.all_gather(pieces, self.axes, axis_index_groups=kind.copies, tiled=True)
        return pieces[: kind.count]


def _interleave(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [number for pair in zip(first, second, strict=True) for number in pair]


def _pad(rows: jax.Array, kind: Kind, value: int) -> jax.Array:
    """Returns rows for all that the holders of a device's blocks own."""
    padding = kind.owned * kind.holders * len(kind.copies[0]) - kind.count
    if not padding:
        return rows
    return jnp.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1), constant_values=value)


def _own_rows(kind: Kind, rows: jax.Array, position: np.ndarray, device: jax.Array, length: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(rows, jnp.asarray(position)[device] * length, length)


class _Arrangement(NamedTuple):
    """What decides which devices hold a block: its stack, its parts, and what divides layers and the block's axes."""

    stack: int
    parts: Shape
    layers: Axes
    spec: Spec


@functools.lru_cache(maxsize=32)
def find_holders(plan: Plan, mesh: tuple[tuple[str, int], ...]) -> Holders | None:
    """Returns how a plan's stacks are divided among holders, or None where no parameter is known to be sharded.

    Args:
      plan: the plan.
      mesh: the names and sizes of the mesh axes that blocks are divided over.
    """
    sizes = dict(mesh)
    specs = [_within(unit, sizes) for unit in plan.units]
    if all(count_shards(names, sizes) == 1 for spec in specs for names in spec):
        return None
    local = [_shard(unit, spec, sizes) for unit, spec in zip(plan.units, specs, strict=True)]
    # Fragments of one arrangement, in the order of the parameters: their shape, their count, and their numbers.
    found: dict[_Arrangement, list[tuple[Stack, tuple[np.ndarray, np.ndarray]]]] = {}
    members: list[list[tuple[_Arrangement, int, int]]] = []
    for unit, spec, (own, _), places in zip(plan.units, specs, local, plan.placements, strict=True):
        layers = len(unit.layer_shape)
        of_layers = tuple(name for names in spec[:layers] for name in names)
        members.append([])
        pairs = zip(windows(unit.cuts), windows(own.cuts), own.stacks, places, strict=True)
        for window, of_device, fragments, place in pairs:
            divided = tuple(run.length // part.length for run, part in zip(window, of_device, strict=True))
            arrangement = _Arrangement(place.stack, divided, of_layers, spec[layers:])
            # Of the grid of blocks of all layers a device has a box.
            grid = (*unit.layer_shape, *(run.count for run in window))
            box = (*own.layer_shape, *(run.count for run in of_device))
            of_boxes = zip(spec, (*(1 for _ in range(layers)), *divided), box, strict=True)
            corner = [_shard_index(names, sizes) // together * length for names, together, length in of_boxes]
            first = np.asarray(place.start + np.ravel_multi_index(corner, grid), np.int32)
            offsets = np.asarray(np.ravel_multi_index(list(np.indices(box).reshape(len(box), -1)), grid), np.int32)
            earlier = found.setdefault(arrangement, [])
            members[-1].append((arrangement, sum([stack.count for stack, _ in earlier]), fragments.count))
            earlier.append((fragments, (first, offsets)))
    order = sorted(found, key=lambda arrangement: arrangement.stack)  # stable
    counts = [sum([stack.count for stack, _ in found[arrangement]]) for arrangement in order]
    return Holders(
        Plan(
            units=tuple([unit for unit, _ in local]),
            stacks=tuple(
                [dataclasses.replace(found[which][0][0], count=n) for which, n in zip(order, counts, strict=True)]
            ),
            placements=tuple(
                tuple(Placement(order.index(which), start, count) for which, start, count in of_unit)
                for of_unit in members
            ),
        ),
        tuple(
            _kind(which, count, [numbers for _, numbers in found[which]], sizes)
            for which, count in zip(order, counts, strict=True)
        ),
        {path: spec for _, of_parameters in local for path, spec in of_parameters.items()},
        tuple(sizes),
    )


def _shard_index(names: Axes, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns which shard each device has of an axis that mesh axes divide."""
    shape = tuple(sizes.values())
    coordinates = dict(zip(sizes, np.unravel_index(np.arange(math.prod(shape)), shape), strict=True))
    index = np.zeros(math.prod(shape), np.int64)
    for name in names:
        index = index * sizes[name] + coordinates[name]
    return index


def _kind(
    which: _Arrangement, count: int, numbers: list[tuple[np.ndarray, np.ndarray]], sizes: Mapping[str, int]
) -> Kind:
    used = {*which.layers, *(name for names in which.spec for name in names)}
    others = tuple(name for name in sizes if name not in used)
    copy, copies, holders = _shard_index(others, sizes), count_shards(others, sizes), math.prod(which.parts)
    part, blocks = np.zeros_like(copy), [_shard_index(which.layers, sizes)]
    for names, divided in zip(which.spec, which.parts, strict=True):
        index = _shard_index(names, sizes)
        part = part * divided + index % divided
        blocks.append(index // divided)
    return Kind(
        which.stack,
        which.parts,
        count,
        owned=-(-count // (copies * holders)),
        position=(copy * holders + part).astype(np.int32),
        peers=np.lexsort((part, copy, *blocks)).reshape(-1, holders).tolist(),
        copies=np.lexsort((copy, part, *blocks)).reshape(-1, copies).tolist(),
        numbers=numbers,
    )


def _within(unit: Unit, sizes: Mapping[str, int]) -> Spec:
    """Returns a unit's spec over some of the mesh axes alone, where its blocks nest with these shards, too."""
    lengths = [*unit.layer_shape, *unit.lengths]
    pieces = [*(1 for _ in unit.layer_shape), *(cut.piece for cut in unit.cuts)]
    within = tuple(tuple(name for name in names if name in sizes) for names in unit.spec)
    return keep_nested(within, lengths, pieces, sizes)


def _shard(unit: Unit, spec: Spec, sizes: Mapping[str, int]) -> tuple[Unit, dict[str, Spec]]:
    """Returns the unit of a device's own part of a unit, and what divides its parameters, by key path."""
    layers = len(unit.layer_shape)
    if not any(spec):
        return unit, {path: ((),) * len(shape) for path, shape in zip(unit.paths, unit.shapes, strict=True)}
    [path], [shape], [layer_axes] = unit.paths, unit.shapes, unit.layer_axes  # parameters that are joined have no spec
    axes = carriers(shape, layer_axes, unit.lengths)
    of_parameter = tuple(spec[axes.index(axis)] if axis in axes else () for axis in range(len(shape)))
    divide = lambda lengths, spec: tuple(
        n // count_shards(names, sizes) for n, names in zip(lengths, spec, strict=True)
    )
    local_shape, layer_shape = divide(shape, of_parameter), divide(unit.layer_shape, spec[:layers])
    lengths = divide(unit.lengths, spec[layers:])
    cuts = tuple(Cut(n, min(cut.piece, n)) for n, cut in zip(lengths, unit.cuts, strict=True))
    count = math.prod(layer_shape)
    fragments = tuple(Stack(block_shape(window), (), (), count * block_count(window)) for window in windows(cuts))
    local = dataclasses.replace(
        unit,
        shapes=(local_shape,),
        layer_shape=layer_shape,
        tensor_shape=without_axes(local_shape, layer_axes) if unit.rule is None else lengths,
        lengths=lengths,
        cuts=cuts,
        stacks=fragments,
    )
    return local, {path: of_parameter}

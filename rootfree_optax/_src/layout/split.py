"""Cutting a tensor into blocks along its axes, and putting it together again.

No block is padded: what is left of an axis makes a shorter piece, so that a tensor of N axes has blocks of up to 2ᴺ
shapes. All blocks of one shape come out of one reshape and transposition.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax

from rootfree_optax._src.common.trees import Shape


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive pieces of equal length: `count` of `length`, the first of which begins at `start`."""

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        """Where the last piece ends."""
        return self.start + self.count * self.length


@dataclasses.dataclass(frozen=True)
class Cut:
    """An axis cut into consecutive pieces, of which the last may be shorter.

    Args:
      length: the axis's length, at least one.
      piece: the pieces' length, in [1, length]; `length` leaves the axis whole.
    """

    length: int
    piece: int

    @property
    def runs(self) -> tuple[Run, ...]:
        """The pieces, as one run, or as two where the last is shorter."""
        count, rest = divmod(self.length, self.piece)
        full = Run(0, self.piece, count)
        return (full, Run(full.stop, rest, 1)) if rest else (full,)


def windows(cuts: Sequence[Cut]) -> tuple[tuple[Run, ...], ...]:
    """Returns the parts of a tensor whose blocks have one shape, each as a run per axis; the last axis varies first."""
    return tuple(itertools.product(*(cut.runs for cut in cuts)))


def block_shape(window: Sequence[Run]) -> Shape:
    """Returns the shape of the blocks of a window."""
    return tuple(run.length for run in window)


def block_count(window: Sequence[Run]) -> int:
    """Returns the number of blocks in a window."""
    return math.prod(run.count for run in window)


RelayoutFn: TypeAlias = Callable[[jax.Array, Sequence[Cut], int], jax.Array]


def split(array: jax.Array, cuts: Sequence[Cut], relayout: RelayoutFn) -> tuple[jax.Array, ...]:
    """Cuts each layer's tensor into blocks.

    Args:
      array: [*layers, *lengths], the lengths being those of `cuts`.
      cuts: one per axis of a layer.
      relayout: moves the blocks between devices before their axes of counts are merged, [*layers, *counts, *block];
        called as relayout(blocks, cuts, first axis of the block).

    Returns:
      For each window one array [n, *block], in which n counts the layers and, within a layer, the blocks in row-major
      order.
    """
    return tuple(_to_blocks(_slice(array, window), cuts, window, relayout) for window in windows(cuts))


def join(blocks: Sequence[jax.Array], cuts: Sequence[Cut], layer_shape: Shape, relayout: RelayoutFn) -> jax.Array:
    """Puts blocks of one dtype together again: the inverse of `split`.

    Args:
      blocks: for each window one array [n, *block].
      cuts: one per axis of a layer.
      layer_shape: the lengths of the layer axes.
      relayout: see `split`.

    Returns:
      [*layers, *lengths].
    """
    parts = [
        _from_blocks(array, cuts, window, layer_shape, relayout)
        for array, window in zip(blocks, windows(cuts), strict=True)
    ]
    for axis in reversed(range(len(cuts))):
        group = len(cuts[axis].runs)
        if group > 1:
            neighbours = [parts[i : i + group] for i in range(0, len(parts), group)]
            parts = [jax.lax.concatenate(pair, len(layer_shape) + axis) for pair in neighbours]
    (array,) = parts
    return array


def _slice(array: jax.Array, window: Sequence[Run]) -> jax.Array:
    layer_shape = array.shape[: array.ndim - len(window)]
    starts = (*(0 for _ in layer_shape), *(run.start for run in window))
    stops = (*layer_shape, *(run.stop for run in window))
    # A slice of everything would still be an operation of the program.
    return array if stops == array.shape and not any(starts) else jax.lax.slice(array, starts, stops)


def _interleaved(window: Sequence[Run], layer_shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Returns the shape in which each cut axis is two, (count, length), and the permutation that brings counts first.

    An axis in one piece stays one, so that a tensor cut along its first axis alone needs no transposition.
    """
    shape, counts, lengths = list(layer_shape), list(range(len(layer_shape))), []
    for run in window:
        if run.count > 1:
            counts.append(len(shape))
            shape.append(run.count)
        lengths.append(len(shape))
        shape.append(run.length)
    return tuple(shape), (*counts, *lengths)


def _to_blocks(array: jax.Array, cuts: Sequence[Cut], window: Sequence[Run], relayout: RelayoutFn) -> jax.Array:
    shape, permutation = _interleaved(window, array.shape[: array.ndim - len(window)])
    blocks = array.reshape(shape).transpose(permutation)
    return relayout(blocks, cuts, blocks.ndim - len(window)).reshape(-1, *block_shape(window))


def _from_blocks(
    blocks: jax.Array, cuts: Sequence[Cut], window: Sequence[Run], layer_shape: Shape, relayout: RelayoutFn
) -> jax.Array:
    shape, permutation = _interleaved(window, layer_shape)
    inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
    permuted = blocks.reshape(tuple(shape[axis] for axis in permutation))
    permuted = relayout(permuted, cuts, permuted.ndim - len(window))
    return permuted.transpose(inverse).reshape(*layer_shape, *(run.stop - run.start for run in window))

"""Splits a tensor into blocks along its axes, and joins them again.

Blocks are not padded. The last piece of an axis may be shorter, so the blocks of a tensor with N axes have up to 2ᴺ
shapes. All blocks of one shape are split off by one reshape and one transposition.
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
    """`count` consecutive pieces of one `length`, from `start` on."""

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        """The end of the last piece."""
        return self.start + self.count * self.length


@dataclasses.dataclass(frozen=True)
class Cut:
    """An axis cut into consecutive pieces of one length; the last may be shorter.

    Args:
      length: the length of the axis, at least 1.
      piece: the length of a piece, in [1, length]. With `length`, the axis stays whole.
    """

    length: int
    piece: int

    @property
    def runs(self) -> tuple[Run, ...]:
        """One run, or two if the last piece is shorter."""
        count, rest = divmod(self.length, self.piece)
        full = Run(0, self.piece, count)
        return (full, Run(full.stop, rest, 1)) if rest else (full,)


def windows(cuts: Sequence[Cut]) -> tuple[tuple[Run, ...], ...]:
    """Returns the windows of a tensor, each with blocks of one shape, as one run per axis, in row-major order."""
    return tuple(itertools.product(*(cut.runs for cut in cuts)))


def block_shape(window: Sequence[Run]) -> Shape:
    """Returns the shape of the blocks of a window."""
    return tuple(run.length for run in window)


def block_count(window: Sequence[Run]) -> int:
    """Returns the number of blocks in a window."""
    return math.prod(run.count for run in window)


# Reshards a tensor [*layers, *lengths], or blocks before their counts are merged, [*layers, *counts, *block], so that
# splitting stays on each device. Called as relayout(array, cuts, first axis of the lengths or of the block).
RelayoutFn: TypeAlias = Callable[[jax.Array, Sequence[Cut], int], jax.Array]


def split(array: jax.Array, cuts: Sequence[Cut], relayout: RelayoutFn) -> tuple[jax.Array, ...]:
    """Splits each layer of a tensor into blocks.

    Args:
      array: [*layers, *lengths], with the lengths of `cuts`.
      cuts: one per axis of a layer.
      relayout: reshards the blocks before their counts are merged.

    Returns:
      One array [n, *block] for each window, ordered by layer and, within a layer, row by row.
    """
    inside = lambda window: array[(..., *(slice(run.start, run.stop) for run in window))]
    return tuple(_to_blocks(inside(window), cuts, window, relayout) for window in windows(cuts))


def join(blocks: Sequence[jax.Array], cuts: Sequence[Cut], layer_shape: Shape) -> jax.Array:
    """Joins blocks of one dtype: the inverse of `split`.

    Args:
      blocks: one array [n, *block] for each window.
      cuts: one per axis of a layer.
      layer_shape: the lengths of the layer axes.

    Returns:
      [*layers, *lengths].
    """
    parts = [_from_blocks(array, window, layer_shape) for array, window in zip(blocks, windows(cuts), strict=True)]
    for axis in reversed(range(len(cuts))):
        group = len(cuts[axis].runs)
        if group > 1:
            neighbours = [parts[i : i + group] for i in range(0, len(parts), group)]
            parts = [jax.lax.concatenate(pair, len(layer_shape) + axis) for pair in neighbours]
    (array,) = parts
    return array


def _interleaved(window: Sequence[Run], layer_shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Returns the shape with two axes (count, length) for each cut axis, and the permutation that moves counts first.

    An axis in one piece stays one axis, so a tensor that is cut along its first axis only needs no transposition.
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


def _from_blocks(blocks: jax.Array, window: Sequence[Run], layer_shape: Shape) -> jax.Array:
    shape, permutation = _interleaved(window, layer_shape)
    inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
    permuted = blocks.reshape(tuple(shape[axis] for axis in permutation))
    return permuted.transpose(inverse).reshape(*layer_shape, *(run.stop - run.start for run in window))

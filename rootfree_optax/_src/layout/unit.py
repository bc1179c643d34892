"""A unit: a parameter, or a group of them, on its way to blocks and back.

Layer axes are set apart, axes of length one dropped and small neighbours merged: none of this reorders entries, so
either direction is a single reshape.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout import split
from rootfree_optax._src.layout.group import Group, join_members, split_members
from rootfree_optax._src.layout.stack import Stack, widest
from rootfree_optax._src.structures import StructureFactory


def squeezed(shape: Shape) -> Shape:
    """Returns a shape without its axes of length one; a scalar's, or one of nothing else, keeps a single one."""
    return tuple(length for length in shape if length != 1) or (1,)


def merged(shape: Shape, bound: int) -> Shape:
    """Returns a shape with neighbouring axes merged, from the left, while their product stays within `bound`.

    From the left, because the last axis of a kernel is its output in JAX's layers: of (3, 3, 64, 128), a bound of 1024
    makes (576, 128), the window and the input features against the output features.
    """
    lengths: list[int] = []
    for length in shape:
        if lengths and lengths[-1] * length <= bound:
            lengths[-1] *= length
        else:
            lengths.append(length)
    return tuple(lengths)


@dataclasses.dataclass(frozen=True)
class Axes:
    """How the axes of an array are read.

    Args:
      shape: the array's shape, with the layer axes in front.
      layers: the number of layer axes: each index along them is an independent layer.
      lengths: the lengths of a layer's axes once squeezed and merged; their product is a layer's size.
    """

    shape: Shape
    layers: int
    lengths: Shape

    @property
    def layer_shape(self) -> Shape:
        """The lengths of the layer axes."""
        return self.shape[: self.layers]


def to_axes(array: jax.Array, axes: Axes) -> jax.Array:
    """Returns `array`, of `axes.shape`, as [*layers, *lengths]."""
    return array.reshape(*axes.layer_shape, *axes.lengths)


def from_axes(array: jax.Array, axes: Axes) -> jax.Array:
    """Returns [*layers, *lengths] as an array of `axes.shape`: the inverse of `to_axes`."""
    return array.reshape(axes.shape)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is preconditioned as one tensor.

    Args:
      name: the key path, of a group as in 'dense/kernel+bias'.
      paths: the key paths of the parameters.
      shapes: their shapes.
      rule: what joins them; None for a parameter by itself.
      axes: how the joined tensor's axes are read.
      cuts: how they are cut, one per axis of a layer.
      stacks: the blocks that come of it: one small stack for each window of the cuts.
    """

    name: str
    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rule: Group | None
    axes: Axes
    cuts: tuple[split.Cut, ...]
    stacks: tuple[Stack, ...]

    def to_blocks(self, arrays: Sequence[jax.Array], placed: split.Placed = split.as_it_is) -> tuple[jax.Array, ...]:
        """Returns the blocks [n, *block] of each of the unit's stacks."""
        dtype = widest(array.dtype for array in arrays)
        tensor = join_members([array.astype(dtype) for array in arrays], self.rule, self.axes.layers)
        return split.split(to_axes(tensor, self.axes), self.cuts, placed)

    def from_blocks(self, blocks: Sequence[jax.Array], placed: split.Placed = split.as_it_is) -> tuple[jax.Array, ...]:
        """Returns the parameters' arrays: the inverse of `to_blocks`."""
        dtype = widest(array.dtype for array in blocks)
        tensor = split.join([array.astype(dtype) for array in blocks], self.cuts, self.axes.layer_shape, placed)
        return split_members(from_axes(tensor, self.axes), self.rule, self.shapes, self.axes.layers)

    def block_indices(self) -> Iterator[list[tuple[Shape, Shape]]]:
        """Yields each stack's blocks, in order: the index along the layer axes, and the one along the axes."""
        for window in split.windows(self.cuts):
            first = [run.start // cut.piece for run, cut in zip(window, self.cuts, strict=True)]
            counts = [run.count for run in window]
            yield [
                (layer, tuple(start + i for start, i in zip(first, index, strict=True)))
                for layer in itertools.product(*map(range, self.axes.layer_shape))
                for index in itertools.product(*map(range, counts))
            ]


def stacks_of(
    factories: Sequence[StructureFactory], cuts: Sequence[split.Cut], layer_shape: Shape
) -> tuple[Stack, ...]:
    """Returns the small stacks of a unit: one for each window of its cuts, over all layers."""
    layers = math.prod(layer_shape)
    return tuple(
        Stack(
            split.block_shape(window),
            tuple(factory(run.length) for factory, run in zip(factories, window, strict=True)),
            layers * split.block_count(window),
        )
        for window in split.windows(cuts)
    )

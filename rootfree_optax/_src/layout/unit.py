"""Units: a parameter, or a group of parameters, as one tensor, and its blocks.

Layer axes are moved to the front, by one transposition unless they lead already. Then axes of length one are dropped
and small neighbouring axes merged. This keeps the order of the entries, so it takes one reshape in each direction.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from rootfree_optax._src.common.meshes import Spec
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout import split
from rootfree_optax._src.layout.group import Group, join_members, split_members
from rootfree_optax._src.layout.stack import Stack, widest
from rootfree_optax._src.structures.names import StructureFactory


def squeeze(shape: Shape) -> Shape:
    """Returns a shape without its axes of length one, or (1,) if no other axis is left."""
    return tuple(length for length in shape if length != 1) or (1,)


def merge(shape: Shape, bound: int) -> Shape:
    """Returns a shape with neighbouring axes merged, from the left, while their product stays within `bound`.

    The last axis stays as it is: it is a kernel's output in Flax. With a bound of 1024, (3, 3, 64, 128) becomes
    (576, 128), where window and input features form one axis and the output features the other; with 32, (9, 64, 128).
    """
    lengths: list[int] = []
    for length in shape[:-1]:
        if lengths and lengths[-1] * length <= bound:
            lengths[-1] *= length
        else:
            lengths.append(length)
    return (*lengths, *shape[-1:])


def without_axes(shape: Sequence[int], axes: Sequence[int]) -> Shape:
    """Returns a shape without the axes at the given positions."""
    return tuple(length for axis, length in enumerate(shape) if axis not in axes)


def no_relayout(array: jax.Array, cuts: Sequence[split.Cut], first: int) -> jax.Array:
    """Identity: the default when no resharding is needed, see `RelayoutFn`."""
    del cuts, first
    return array


@dataclasses.dataclass(frozen=True)
class Unit:
    """One or more parameters that are preconditioned as one tensor.

    Args:
      name: the key path, or the name of a group, such as 'dense/kernel+bias'.
      paths: the key paths of the parameters.
      shapes: the shapes of the parameters.
      layer_axes: the positions of the layer axes of each parameter.
      rule: the rule that joins the parameters, or None for a single parameter as it is.
      layer_shape: the lengths of the layer axes. Each index along them is an independent layer.
      tensor_shape: the shape of one layer of the joined tensor.
      lengths: `tensor_shape`, squeezed and merged.
      cuts: how `lengths` are cut, one per axis.
      stacks: the unit's blocks, as one small stack for each window of the cuts.
      spec: the mesh axes that divide each of the axes [*layers, *lengths], where blocks and shards nest.
    """

    name: str
    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layer_axes: tuple[tuple[int, ...], ...]
    rule: Group | None
    layer_shape: Shape
    tensor_shape: Shape
    lengths: Shape
    cuts: tuple[split.Cut, ...]
    stacks: tuple[Stack, ...]
    spec: Spec

    @property
    def is_cut(self) -> bool:
        """Whether an axis is cut, so that each layer has several blocks."""
        return self.stacks[0].shape != self.lengths

    def to_blocks(self, arrays: Sequence[jax.Array], relayout: split.RelayoutFn = no_relayout) -> tuple[jax.Array, ...]:
        """Returns the blocks [n, *block] of each stack of the unit.

        Args:
          arrays: one array for each parameter, of `shapes`.
          relayout: reshards the tensor [*layers, *lengths] and the blocks cut from it, see `RelayoutFn`.
        """
        pairs = zip(arrays, self.layer_axes, strict=True)
        arrays = [jnp.moveaxis(array, axes, range(len(axes))) for array, axes in pairs]
        tensor = arrays[0]
        if self.rule is not None:
            dtype = widest([array.dtype for array in arrays])
            tensor = join_members([array.astype(dtype) for array in arrays], self.rule, len(self.layer_shape))
        tensor = tensor.reshape(*self.layer_shape, *self.lengths)
        tensor = relayout(tensor, self.cuts, len(self.layer_shape))
        if self.is_cut:
            return split.split(tensor, self.cuts, relayout)
        return (tensor.reshape(-1, *self.lengths),)

    def from_blocks(self, blocks: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Returns one array for each parameter: the inverse of `to_blocks`."""
        tensor = blocks[0]
        if self.is_cut:
            dtype = widest([array.dtype for array in blocks])
            tensor = split.join([array.astype(dtype) for array in blocks], self.cuts, self.layer_shape)
        tensor = tensor.reshape(*self.layer_shape, *self.tensor_shape)
        arrays: tuple[jax.Array, ...] = (tensor,)
        if self.rule is not None:
            shapes = [without_axes(shape, axes) for shape, axes in zip(self.shapes, self.layer_axes, strict=True)]
            arrays = split_members(tensor, self.rule, shapes, len(self.layer_shape))
        pairs = zip(arrays, self.layer_axes, strict=True)
        return tuple([jnp.moveaxis(array, range(len(axes)), axes) for array, axes in pairs])

    def block_indices(self) -> Iterator[list[tuple[Shape, Shape]]]:
        """Yields for each stack the indices of its blocks, in order: along the layer axes, and along the cut axes."""
        for window in split.windows(self.cuts):
            first = [run.start // cut.piece for run, cut in zip(window, self.cuts, strict=True)]
            counts = [run.count for run in window]
            yield [
                (layer, tuple(start + i for start, i in zip(first, index, strict=True)))
                for layer in itertools.product(*map(range, self.layer_shape))
                for index in itertools.product(*map(range, counts))
            ]


def make_stacks(
    factories: Sequence[StructureFactory],
    factor_dtypes: tuple[jnp.dtype | None, ...],
    cuts: Sequence[split.Cut],
    layer_shape: Shape,
) -> tuple[Stack, ...]:
    """Returns the small stacks of a unit, one for each window of its cuts, with the blocks of all layers."""
    layers = math.prod(layer_shape)
    return tuple(
        Stack(
            split.block_shape(window),
            tuple(factory(run.length) for factory, run in zip(factories, window, strict=True)),
            factor_dtypes,
            layers * split.block_count(window),
        )
        for window in split.windows(cuts)
    )

"""The axes that have a factor each: layer axes set apart, axes of length one dropped, small neighbours merged.

None of this reorders entries, so either direction is a single reshape.
"""

import dataclasses
from typing import TypeAlias

import jax

Shape: TypeAlias = tuple[int, ...]


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

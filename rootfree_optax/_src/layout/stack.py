"""Stacks: all blocks of one kind, over the whole tree, as one array."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.structures.base import Flops, Structure


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks of one shape, one structure and one choice of dtypes, held in one array [count, *shape].

    Args:
      shape: of a block, (d₁, …, d_N).
      structures: of the factors, one per axis.
      factor_dtypes: the dtypes of the factors, one per axis; None is the widest dtype of the stack's parameters.
      count: the number of blocks.
    """

    shape: Shape
    structures: tuple[Structure, ...]
    factor_dtypes: tuple[jnp.dtype | None, ...]
    count: int

    @property
    def part_shapes(self) -> list[Shape]:
        """The shapes of the factors' parts, with their leading axis of blocks, axis by axis."""
        return [(self.count, *shape) for structure in self.structures for shape in structure.part_shapes]

    def state_bytes(
        self,
        *,
        riemannian_momentum: bool = False,
        cached_products: bool = False,
        observed_curvature: bool = False,
    ) -> int:
        """Returns the bytes of the factors of all blocks, in their own dtypes; None counts as float32.

        Args:
          riemannian_momentum: whether each factor has a momentum, of its size and dtype.
          cached_products: whether each factor has K Kᵀ beside it, of its size and dtype.
          observed_curvature: whether each factor has a sum beside it, as `curvature_every` keeps.
        """
        sizes = [sum(map(math.prod, structure.part_shapes)) for structure in self.structures]
        itemsizes = [jnp.dtype(jnp.float32 if dtype is None else dtype).itemsize for dtype in self.factor_dtypes]
        bytes_each = [size * itemsize for size, itemsize in zip(sizes, itemsizes, strict=True)]
        return self.count * sum(bytes_each) * (1 + riemannian_momentum + cached_products + observed_curvature)

    @property
    def apply_flops(self) -> int:
        """Floating-point operations of a direction: Kᵀ and K are applied along each axis."""
        return self.count * sum(2 * flops.apply for flops in self._flops)

    @property
    def refresh_flops(self) -> int:
        """Floating-point operations of a refresh: Kᵀ is applied, XXᵀ and KᵀK are projected, K is multiplied by m."""
        return self.count * sum(f.apply + f.project_outer + f.project_inner + f.matmul for f in self._flops)

    @property
    def square_flops(self) -> int:
        """Floating-point operations of K Kᵀ for all factors; a direction by those takes half of `apply_flops`."""
        return self.count * sum(flops.matmul for flops in self._flops)

    @property
    def _flops(self) -> list[Flops]:
        size = math.prod(self.shape)
        pairs = zip(self.structures, self.shape, strict=True)
        return [structure.flops(columns=size // length) for structure, length in pairs]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where blocks stand: in which stack, from which position on, and how many."""

    stack: int
    start: int
    count: int


def place(parts: Sequence[Stack]) -> tuple[tuple[Stack, ...], tuple[Placement, ...]]:
    """Concatenates small stacks, in order, into one for each kind: each shape, structures and dtypes.

    Returns:
      The stacks, in the order in which they first occur, and the place in them of each part.
    """
    counts: dict[Stack, int] = {}
    kinds, starts = [dataclasses.replace(part, count=0) for part in parts], []
    for kind, part in zip(kinds, parts, strict=True):
        starts.append(counts.get(kind, 0))
        counts[kind] = starts[-1] + part.count
    index = {kind: i for i, kind in enumerate(counts)}
    placements = [
        Placement(index[kind], start, part.count) for kind, part, start in zip(kinds, parts, starts, strict=True)
    ]
    return tuple(dataclasses.replace(kind, count=count) for kind, count in counts.items()), tuple(placements)


def padded_lengths(stacks: Sequence[Stack], shapes: Sequence[Shape]) -> tuple[int, ...] | None:
    """Returns the length of each stack's arrays, if their parts have these shapes, and None if they cannot.

    Each count may be rounded up to a multiple of one number, as it is for stacks that are split over devices.

    Args:
      stacks: what the arrays should hold.
      shapes: of all parts of all factors, in the order of `Stack.part_shapes`.
    """
    expected = [(i, stack.count, shape) for i, stack in enumerate(stacks) for shape in stack.part_shapes]
    if [tuple(shape[1:]) for shape in shapes] != [shape[1:] for _, _, shape in expected]:
        return None
    multiple = math.gcd(*(shape[0] for shape in shapes))
    if not all(0 <= shape[0] - count < multiple for shape, (_, count, _) in zip(shapes, expected, strict=True)):
        return None
    lengths = {i: shape[0] for shape, (i, _, _) in zip(shapes, expected, strict=True)}
    return tuple(lengths.values())


def widest(dtypes: Iterable[DTypeLike]) -> jnp.dtype:
    """Returns a dtype that holds numbers of all given real floating-point dtypes; float32 for none."""
    distinct = {jnp.dtype(dtype) for dtype in dtypes}
    if len(distinct) == 1:
        return distinct.pop()
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in distinct else jnp.float32)


def stack(
    pieces: Sequence[jax.Array | None], placements: Sequence[Placement], stacks: Sequence[Stack]
) -> tuple[jax.Array, ...]:
    """Concatenates arrays of blocks, in the order of their placements.

    Args:
      pieces: [n, *block] for each placement; None stands for blocks without values, which become NaN.
      placements: their places, as `place` returned them.
      stacks: what to fill.

    Returns:
      [count, *shape] for each stack, of the widest dtype among its pieces.
    """
    members: list[list[tuple[jax.Array | None, int]]] = [[] for _ in stacks]
    for piece, placement in zip(pieces, placements, strict=True):
        members[placement.stack].append((piece, placement.count))
    arrays = []
    for target, parts in zip(stacks, members, strict=True):
        dtype = widest([piece.dtype for piece, _ in parts if piece is not None])
        filled = [
            jnp.full((count, *target.shape), jnp.nan, dtype) if piece is None else piece.astype(dtype)
            for piece, count in parts
        ]
        arrays.append(filled[0] if len(filled) == 1 else jax.lax.concatenate(filled, 0))
    return tuple(arrays)


def unstack(
    arrays: Sequence[jax.Array], placements: Iterable[Placement], numbers: Mapping[int, jax.Array] | None = None
) -> list[jax.Array]:
    """Returns the blocks at the given places: the inverse of `stack`.

    Args:
      arrays: the stacks.
      placements: the places.
      numbers: as `opaque` returns them, zero and where the blocks begin; without, the program has the numbers.
    """
    return [_rows(arrays[place.stack], place, numbers) for place in placements]


def _rows(array: jax.Array, place: Placement, numbers: Mapping[int, jax.Array] | None) -> jax.Array:
    # A slice of everything would still be an operation of the program.
    if place.count == array.shape[0]:
        return array
    if numbers is None:
        return jax.lax.slice_in_dim(array, place.start, place.start + place.count)
    # Not dynamic_slice_in_dim: for every parameter it would make its own zeros for the other axes.
    starts = (numbers[place.start], *(numbers[0] for _ in array.shape[1:]))
    return jax.lax.dynamic_slice(array, starts, (place.count, *array.shape[1:]))


def opaque(numbers: Iterable[int], array: jax.Array) -> dict[int, jax.Array]:
    """Returns for each number an array [] in uint32 whose value the compiler does not see.

    Compilers make each distinct kernel anew, in 10 ms or more; rows of a stack that begin at a number that is in the
    program are a kernel of their own for every parameter of a model.

    Args:
      numbers: at least zero.
      array: any that is not empty; nothing depends on its values.
    """
    distinct = sorted(set(numbers))
    as_arrays = lambda: [jnp.uint32(number) for number in distinct]
    # Both branches are the same; no compiler looks for that.
    return dict(zip(distinct, jax.lax.cond(jnp.ravel(array)[0] > 0, as_arrays, as_arrays), strict=True))

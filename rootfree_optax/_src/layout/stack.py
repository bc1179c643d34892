"""Stacks: all blocks of one kind in the whole tree, as one array."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.structures.base import Structure


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks with one shape, the same structures and the same factor dtypes, in one array [count, *shape].

    Args:
      shape: the shape of a block, (d₁, …, d_N).
      structures: the structures of the factors, one per axis.
      factor_dtypes: the dtypes of the factors, one per axis. None: the widest dtype among the stack's parameters.
      count: the number of blocks.
    """

    shape: Shape
    structures: tuple[Structure, ...]
    factor_dtypes: tuple[jnp.dtype | None, ...]
    count: int

    @property
    def part_shapes(self) -> list[Shape]:
        """The shapes of the parts of a block's factors, axis by axis."""
        return [shape for structure in self.structures for shape in structure.part_shapes]


@dataclasses.dataclass(frozen=True)
class Placement:
    """The place of consecutive blocks: the stack, the position of the first, and their number."""

    stack: int
    start: int
    count: int


def place(parts: Sequence[Stack]) -> tuple[tuple[Stack, ...], tuple[Placement, ...]]:
    """Concatenates small stacks, in order, into one stack for each kind of block.

    Returns:
      The stacks, in the order of their first parts, and the place of each part.
    """
    counts: dict[Stack, int] = {}
    placements = []
    for part in parts:
        kind = dataclasses.replace(part, count=0)
        start = counts.setdefault(kind, 0)
        placements.append(Placement(list(counts).index(kind), start, part.count))
        counts[kind] += part.count
    return tuple(dataclasses.replace(kind, count=count) for kind, count in counts.items()), tuple(placements)


def widest(dtypes: Iterable[DTypeLike]) -> jnp.dtype:
    """Returns a dtype that holds the numbers of all given real floating-point dtypes; float32 if there are none."""
    distinct = {jnp.dtype(dtype) for dtype in dtypes}
    if len(distinct) == 1:
        return distinct.pop()
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in distinct else jnp.float32)


def stack(
    pieces: Sequence[jax.Array | None], placements: Sequence[Placement], stacks: Sequence[Stack]
) -> tuple[jax.Array, ...]:
    """Concatenates arrays of blocks into stacks.

    Args:
      pieces: one array [n, *block] for each placement, or None for blocks of −∞.
      placements: the places of the pieces, as returned by `place`.
      stacks: the stacks to fill.

    Returns:
      One array [count, *shape] for each stack, with the widest dtype among its pieces.
    """
    members: list[list[tuple[jax.Array | None, int]]] = [[] for _ in stacks]
    for piece, placement in zip(pieces, placements, strict=True):
        members[placement.stack].append((piece, placement.count))
    arrays = []
    for target, parts in zip(stacks, members, strict=True):
        dtype = widest([piece.dtype for piece, _ in parts if piece is not None])
        filled = [
            jnp.full((count, *target.shape), -jnp.inf, dtype) if piece is None else piece.astype(dtype)
            for piece, count in parts
        ]
        arrays.append(jax.lax.concatenate(filled, 0))
    return tuple(arrays)


def unstack(
    arrays: Sequence[jax.Array], placements: Iterable[Placement], numbers: Mapping[int, jax.Array] | None = None
) -> list[jax.Array]:
    """Returns the blocks at the given places: the inverse of `stack`.

    Args:
      arrays: one array [count, *shape] for each stack.
      placements: the places.
      numbers: zero and the positions of the first blocks, as returned by `opaque`. None: positions are constants of the
        program.
    """
    blocks = []
    for place in placements:
        array, last = arrays[place.stack], place.start + place.count
        if place.count == array.shape[0]:  # a slice of everything would still be an operation of the program
            blocks.append(array)
        elif numbers is None:
            blocks.append(jax.lax.slice_in_dim(array, place.start, last))
        else:
            # dynamic_slice_in_dim would create new zeros for the other axes in every call.
            starts = [numbers[place.start], *[numbers[0]] * (array.ndim - 1)]
            blocks.append(jax.lax.dynamic_slice(array, starts, (place.count, *array.shape[1:])))
    return blocks


def opaque(numbers: Iterable[int], array: jax.Array) -> dict[int, jax.Array]:
    """Returns for each number a scalar array in uint32 whose value the compiler cannot see.

    A compiler needs 10 ms or more for each distinct kernel. With constant positions, slicing a stack takes a different
    kernel for every parameter of a model; with these, parameters of one shape share a kernel.

    Args:
      numbers: non-negative integers.
      array: any array with entries; the result does not depend on its values.
    """
    distinct = sorted(set(numbers))
    as_arrays = lambda: [jnp.uint32(number) for number in distinct]
    # Both branches return the same, but compilers do not compare branches.
    return dict(zip(distinct, jax.lax.cond(jnp.ravel(array)[0] > 0, as_arrays, as_arrays), strict=True))

"""Structures by name: the names of the official PyTorch packages, with any sizes.

A factory takes the number of rows, d, and returns the `Structure` of d×d matrices. Sizes above d are cut to d. So
different factories may give the same set of matrices for a small d; the structures are then equal.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from rootfree_optax._src.structures.base import Structure
from rootfree_optax._src.structures.block_diagonal import BlockDiagonal
from rootfree_optax._src.structures.block_pattern import BlockPattern, Pair
from rootfree_optax._src.structures.toeplitz import TriangularToeplitz

StructureFactory: TypeAlias = Callable[[int], Structure]

STRUCTURE_NAMES = (
    "dense",
    "diagonal",
    "block30diagonal",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
    "trilbottomrightdiag",
    "triltopleftdiag",
    "triubottomrightdiag",
    "triutopleftdiag",
)


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least one, got {size}.")


def _pattern(name: str, dim: int, sizes: Sequence[Pair], couplings: Sequence[Pair] = ()) -> Structure:
    """Returns the pattern with segments of the given (count, size), without empty segments and their couplings."""
    left = [i for i, (count, size) in enumerate(sizes) if count * size > 0]
    segments = tuple(BlockDiagonal(*sizes[i]) for i in left)
    if len(segments) == 1:
        return segments[0]
    renumbered = [(left.index(i), left.index(j)) for i, j in couplings if i in left and j in left]
    return BlockPattern(segments, tuple(sorted(renumbered)), name)


def dense(dim: int) -> Structure:
    """Returns the structure of all d×d matrices, d = `dim`."""
    return BlockDiagonal(count=1, size=dim)


def diagonal(dim: int) -> Structure:
    """Returns the structure of the diagonal d×d matrices, d = `dim`."""
    return BlockDiagonal(count=dim, size=1)


def block_diagonal(block_size: int) -> StructureFactory:
    """Returns the factory of block-diagonal matrices with dense blocks.

    Args:
      block_size: the rows of a block, at least one. If it does not divide d, the last block has the remaining rows.

    Raises:
      ValueError: if `block_size` is below one.

    Example:
      >>> block_diagonal(30)(100).part_shapes
      ((3, 30, 30), (10, 10))
    """
    _require_positive(block_size=block_size)

    def factory(dim: int) -> Structure:
        blocks, remainder = divmod(dim, block_size)
        return _pattern(f"block{block_size}diagonal", dim, [(blocks, block_size), (1, remainder)])

    return factory


def hierarchical(leading: int, trailing: int) -> StructureFactory:
    """Returns the factory of hierarchical matrices: a diagonal between two dense blocks, with couplings.

        [ A  B  B ]
        [ 0  C  0 ]     A and E dense, C diagonal, B and D dense
        [ 0  D  E ]

    Args:
      leading: the rows of A, at least one, and d if that is less.
      trailing: the rows of E, at least one, and the rows below A if there are fewer.

    Raises:
      ValueError: if either is below one.

    Example:
      >>> hierarchical(15, 15)(100).part_shapes
      ((15, 15), (70,), (15, 15), (15, 70), (15, 15), (15, 70))
    """
    _require_positive(leading=leading, trailing=trailing)

    def factory(dim: int) -> Structure:
        top = min(leading, dim)
        bottom = min(trailing, dim - top)
        sizes = [(1, top), (dim - top - bottom, 1), (1, bottom)]
        return _pattern(f"hierarchical{leading}_{trailing}", dim, sizes, [(0, 1), (0, 2), (2, 1)])

    return factory


def corner_diagonal(corner: int = 1, *, lower: bool, corner_first: bool) -> StructureFactory:
    """Returns the factory of block-triangular matrices: a diagonal and a dense corner, with a coupling.

        lower, corner first   lower, corner last   upper, corner first   upper, corner last
            [ A  0 ]              [ C  0 ]              [ A  B ]              [ C  B ]
            [ B  C ]              [ B  A ]              [ 0  C ]              [ 0  A ]

    Args:
      corner: the rows of the dense corner A, at least one. C is the diagonal.
      lower: whether the coupling B is below the diagonal; else, above.
      corner_first: whether A is at the top left; else, at the bottom right.

    Raises:
      ValueError: if `corner` is below one.

    Example:
      >>> corner_diagonal(4, lower=True, corner_first=True)(100).part_shapes
      ((4, 4), (96,), (96, 4))
    """
    _require_positive(corner=corner)
    triangle, place = "tril" if lower else "triu", "bottomright" if corner_first else "topleft"
    name = f"{triangle}{corner if corner > 1 else ''}{place}diag"

    def factory(dim: int) -> Structure:
        size = min(corner, dim)
        sizes = [(1, size), (dim - size, 1)]
        return _pattern(name, dim, sizes if corner_first else sizes[::-1], [(1, 0) if lower else (0, 1)])

    return factory


def triangular_toeplitz(*, lower: bool) -> StructureFactory:
    """Returns the factory of lower- or upper-triangular Toeplitz matrices, which are constant along each diagonal.

    Args:
      lower: whether the matrices are lower triangular; else, upper triangular.

    Example:
      >>> triangular_toeplitz(lower=True)(100).part_shapes
      ((100,),)
    """
    return lambda dim: diagonal(dim) if dim == 1 else TriangularToeplitz(dim, lower)


def structure_factory(structure: str | StructureFactory) -> StructureFactory:
    """Returns the factory of the structures of a name.

    Args:
      structure: one of `STRUCTURE_NAMES`, with any sizes in place of 30 and 15_15, and with the size of a corner after
        'tril' or 'triu', if it is above one, as in 'tril4bottomrightdiag'. Or a factory, which is returned unchanged.

    Raises:
      ValueError: if the name is unknown, or a size in it is below one.
      TypeError: if it is neither a name nor a factory.

    Example:
      >>> structure_factory("block30diagonal")(100)
      block30diagonal(100)
      >>> structure_factory("block30diagonal")(20) == structure_factory("dense")(20)
      True
    """
    if callable(structure):
        return structure
    if not isinstance(structure, str):
        raise TypeError(f"a structure must be a name or a callable from d to a Structure, got {structure!r}.")
    for pattern, build in _NAMED:
        if match := re.fullmatch(pattern, structure):
            try:
                return build(*match.groups())
            except ValueError as error:
                raise ValueError(f"structure {structure!r}: {error}") from None
    known = ", ".join(STRUCTURE_NAMES)
    raise ValueError(f"unknown structure {structure!r}. The known names are {known}, with any sizes.")


def _corner(triangle: str, size: str, place: str) -> StructureFactory:
    return corner_diagonal(int(size or 1), lower=triangle == "tril", corner_first=place == "bottomright")


_NAMED: tuple[tuple[str, Callable[..., StructureFactory]], ...] = (
    ("dense", lambda: dense),
    ("diagonal", lambda: diagonal),
    (r"block(-?\d+)diagonal", lambda size: block_diagonal(int(size))),
    (r"hierarchical(-?\d+)_(-?\d+)", lambda leading, trailing: hierarchical(int(leading), int(trailing))),
    (r"(tril|triu)toeplitz", lambda triangle: triangular_toeplitz(lower=triangle == "tril")),
    (r"(tril|triu)(-?\d*)(bottomright|topleft)diag", _corner),
)

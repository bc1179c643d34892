"""From a structure's name to the structure: the names of the official PyTorch packages, with any sizes.

A factory takes the number of rows, d, and returns the `Structure` of d×d matrices. Sizes beyond d are cut, so different
factories may give the same matrices for a small d; the structures are then equal.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from rootfree_optax._src.structures.base import Structure
from rootfree_optax._src.structures.block_pattern import BlockPattern
from rootfree_optax._src.structures.elimination import Pair
from rootfree_optax._src.structures.segment import Segment
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


def _pattern(name: str, dim: int, segments: Sequence[Segment], couplings: Sequence[Pair] = ()) -> Structure:
    """Returns the pattern without its empty segments and their couplings, by its plainest name."""
    if dim < 1:
        raise ValueError(f"a structure must have at least one row, got {dim}.")
    kept = {old: new for new, old in enumerate(i for i, segment in enumerate(segments) if segment.dim > 0)}
    if len(kept) == 1:
        (only,) = (segments[i] for i in kept)
        name = "diagonal" if only.size == 1 else "dense" if only.count == 1 else name
    renumbered = ((kept[i], kept[j]) for i, j in couplings if i in kept and j in kept)
    return BlockPattern(tuple(segments[i] for i in kept), tuple(sorted(renumbered)), name)


def dense(dim: int) -> Structure:
    """Returns the structure of all d×d matrices, d = `dim`."""
    return _pattern("dense", dim, [Segment(count=1, size=dim)])


def diagonal(dim: int) -> Structure:
    """Returns the structure of the diagonal d×d matrices, d = `dim`."""
    return _pattern("diagonal", dim, [Segment(count=dim, size=1)])


def block_diagonal(block_size: int) -> StructureFactory:
    """Returns the factory of block-diagonal matrices with dense blocks.

    Args:
      block_size: the rows of a block, at least one. Where it does not divide d, the last block has those left over.

    Raises:
      ValueError: if `block_size` is below one.

    Example:
      >>> block_diagonal(30)(100).part_shapes
      ((3, 30, 30), (10, 10))
    """
    _require_positive(block_size=block_size)

    def factory(dim: int) -> Structure:
        blocks, remainder = divmod(dim, block_size)
        segments = [Segment(blocks, block_size), Segment(count=1, size=remainder)]
        return _pattern(f"block{block_size}diagonal", dim, segments)

    return factory


def hierarchical(leading: int, trailing: int) -> StructureFactory:
    """Returns the factory of hierarchical matrices: a diagonal between two dense blocks that couple to it.

        [ A  B  B ]
        [ 0  C  0 ]     A and E dense, C diagonal, B and D dense
        [ 0  D  E ]

    Args:
      leading: the rows of A, at least one. A has d rows where d is less.
      trailing: the rows of E, at least one. E has what A leaves where that is less.

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
        segments = [Segment(1, top), Segment(dim - top - bottom, 1), Segment(1, bottom)]
        return _pattern(f"hierarchical{leading}_{trailing}", dim, segments, [(0, 1), (0, 2), (2, 1)])

    return factory


def corner_diagonal(corner: int = 1, *, lower: bool, corner_first: bool) -> StructureFactory:
    """Returns the factory of block-triangular matrices with a dense corner, a dense coupling, and else a diagonal.

        lower, corner first   lower, corner last   upper, corner first   upper, corner last
            [ A  0 ]              [ C  0 ]              [ A  B ]              [ C  B ]
            [ B  C ]              [ B  A ]              [ 0  C ]              [ 0  A ]

    Args:
      corner: the rows of the dense corner A, at least one. C is the diagonal.
      lower: whether the coupling B is below the diagonal.
      corner_first: whether A is at the top left, rather than at the bottom right.

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
        segments = [Segment(1, size), Segment(dim - size, 1)]
        return _pattern(name, dim, segments if corner_first else segments[::-1], [(1, 0) if lower else (0, 1)])

    return factory


def triangular_toeplitz(*, lower: bool) -> StructureFactory:
    """Returns the factory of lower- or upper-triangular Toeplitz matrices, which are constant along each diagonal.

    Args:
      lower: whether the entries above the diagonal are zero, rather than those below.

    Example:
      >>> triangular_toeplitz(lower=True)(100).part_shapes
      ((100,),)
    """
    return lambda dim: diagonal(dim) if dim == 1 else TriangularToeplitz(dim, lower)


def structure_factory(structure: str | StructureFactory) -> StructureFactory:
    """Returns the factory that a name stands for.

    Args:
      structure: one of `STRUCTURE_NAMES`, where any sizes may stand for 30 and 15_15, and a corner's size may follow
        'tril' or 'triu', as in 'tril4bottomrightdiag'; or a factory, which is returned as it is.

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
    raise ValueError(f"unknown structure {structure!r}. The known ones are {known}, where the sizes may be others.")


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

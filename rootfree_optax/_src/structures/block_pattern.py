"""Block-diagonal matrices with dense blocks beside the diagonal: hierarchical and triangular ones.

The indices are cut into consecutive segments. The block of a segment, on the diagonal, is block-diagonal itself. A
coupling (i, j) of two segments means that the block in the rows of i and the columns of j is dense. All other blocks
are zero. The set is closed under product if the couplings are transitive. Without cycles, (i, j)
and (j, i) are never both couplings.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.numerics.arithmetic import einsum, upcast
from rootfree_optax._src.structures.base import Flops, Parts, Structure
from rootfree_optax._src.structures.block_diagonal import BlockDiagonal, multiply_along, subscripts_along

Pair: TypeAlias = tuple[int, int]


@dataclasses.dataclass(frozen=True, repr=False)
class BlockPattern(Structure):
    """Matrices that are zero outside a pattern of blocks.

    The parts are the segments' parts, then a matrix [rows in i, columns in j] for each coupling (i, j).

    Args:
      segments: the structures of the blocks on the diagonal, at least two. (One is a structure by itself.)
      couplings: the pairs (i, j), i ≠ j, of segments with a dense block between them, transitive and without cycles.
      name: for tables. Patterns that differ in the name alone are equal.

    Raises:
      ValueError: if there are fewer than two segments, or the set is not closed under product.

    Example:
      >>> import jax.numpy as jnp
      >>> arrow = BlockPattern((BlockDiagonal(count=1, size=1), BlockDiagonal(count=2, size=1)), couplings=((0, 1),))
      >>> arrow.to_dense((jnp.array([1.0]), jnp.array([2.0, 3.0]), jnp.array([[4.0, 5.0]]))).tolist()
      [[1.0, 4.0, 5.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    """

    segments: tuple[BlockDiagonal, ...]
    couplings: tuple[Pair, ...] = ()
    name: str = dataclasses.field(default="pattern", compare=False)

    @property
    def dim(self) -> int:
        return sum(segment.dim for segment in self.segments)

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the segments' parts, then of the couplings."""
        couplings = [(self.segments[i].dim, self.segments[j].dim) for i, j in self.couplings]
        return (*itertools.chain(*[segment.part_shapes for segment in self.segments]), *couplings)

    @property
    def is_symmetric(self) -> bool:
        """Whether there is no coupling."""
        return not self.couplings

    def identity(self, dtype: DTypeLike) -> Parts:
        segments = [segment.identity(dtype) for segment in self.segments]
        return (*itertools.chain(*segments), *self.zeros(dtype)[len(segments) :])

    def to_dense(self, parts: Parts) -> jax.Array:
        blocks, indices = self._blocks(parts), range(len(self.segments))

        def dense(i: int, j: int) -> jax.Array:
            zeros = jnp.zeros((self.segments[i].dim, self.segments[j].dim), parts[0].dtype)
            return self.segments[i].to_dense((blocks[i, i],)) if i == j else blocks.get((i, j), zeros)

        return jnp.block([[dense(i, j) for j in indices] for i in indices])

    def matmul(self, left: Parts, right: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of L R: (L R)ᵢⱼ = Σₖ Lᵢₖ Rₖⱼ."""
        lefts, rights, indices = self._blocks(left), self._blocks(right), range(len(self.segments))

        def product(i: int, k: int, j: int) -> jax.Array:
            if i == k == j:
                return self.segments[i].matmul((lefts[i, i],), (rights[i, i],), precision=precision)[0]
            if k == j:  # Lᵢⱼ is the dense one: (Rⱼⱼᵀ Lᵢⱼᵀ)ᵀ
                return multiply_along(rights[j, j], lefts[i, j], 1, transposed=True, precision=precision)
            return multiply_along(lefts[i, k], rights[k, j], 0, precision=precision)

        return tuple(
            _add([product(i, k, j) for k in indices if (i, k) in lefts and (k, j) in rights]) for i, j in self._pairs
        )

    def square(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        return self._by_segment(lambda segment, k: segment.square(k, precision=precision), parts)

    def congruence(self, parts: Parts, symmetric: Parts) -> Parts:
        return self._by_segment(lambda segment, k, s: segment.congruence(k, s), parts, symmetric)

    def trace(self, parts: Parts) -> jax.Array:
        return _add(self._by_segment(lambda segment, k: (segment.trace(k),), parts))

    def symmetric_root(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        root = lambda segment, k: segment.symmetric_root(k, precision=precision)
        return self._by_segment(root, parts)

    def positive_root(self, parts: Parts, least: ArrayLike, *, precision: PrecisionLike = None) -> Parts:
        root = lambda segment, m: segment.positive_root(m, least, precision=precision)
        return self._by_segment(root, parts)

    def times_inverse_root(
        self, parts: Parts, excess: Parts, *, shift: ArrayLike, precision: PrecisionLike = None
    ) -> Parts:
        product = lambda segment, k, e: segment.times_inverse_root(k, e, shift=shift, precision=precision)
        return self._by_segment(product, parts, excess)

    def apply(
        self, parts: Parts, tensor: jax.Array, axis: int, *, transposed: bool = False, precision: PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by K, (K X)ᵢ = Σⱼ Kᵢⱼ Xⱼ, or by Kᵀ, (Kᵀ X)ⱼ = Σᵢ Kᵢⱼᵀ Xᵢ."""
        pieces = self._cut(tensor.astype(parts[0].dtype), axis)
        terms: list[list[jax.Array]] = [[] for _ in pieces]
        for (i, j), block in sorted(self._blocks(parts).items()):
            to, of = (j, i) if transposed else (i, j)
            terms[to].append(multiply_along(block, pieces[of], axis, transposed=transposed, precision=precision))
        return jnp.concatenate([_add(row) for row in terms], axis)

    def project_outer(self, tensor: jax.Array, axis: int, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(X Xᵀ): Xᵢ Xᵢᵀ within a segment, 2 Xᵢ Xⱼᵀ for a coupling."""
        pieces = self._cut(tensor, axis)
        outer = subscripts_along("(I),(J)->IJ", axis, tensor.ndim)
        segments = [s.project_outer(x, axis, precision=precision) for s, x in zip(self.segments, pieces, strict=True)]
        couplings = [2 * einsum(outer, pieces[i], pieces[j], precision=precision) for i, j in self.couplings]
        return (*itertools.chain(*segments), *couplings)

    def project_inner(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(Kᵀ K): Σₖ Kₖᵢᵀ Kₖᵢ within a segment, 2 Σₖ Kₖᵢᵀ Kₖⱼ for a coupling (i, j)."""
        blocks, indices = self._blocks(parts), range(len(self.segments))

        def within(i: int) -> jax.Array:
            segment, coupled = self.segments[i], [blocks[k, j] for k, j in self.couplings if j == i]
            own = segment.project_inner((blocks[i, i],), precision=precision)
            outers = [segment.project_outer(block, 1, precision=precision) for block in coupled]
            return _add([*own, *itertools.chain(*outers)])

        def between(i: int, j: int) -> jax.Array:
            pairs = [(blocks[k, i], blocks[k, j]) for k in indices if (k, i) in blocks and (k, j) in blocks]
            return 2 * _add([multiply_along(a, b, 0, transposed=True, precision=precision) for a, b in pairs])

        return (*map(within, indices), *itertools.starmap(between, self.couplings))

    def squared_norm(self, parts: Parts) -> jax.Array:
        """Returns ‖K‖²_F, the sum of the squares of all entries."""
        return _add([jnp.sum(jnp.square(upcast(part))) for part in parts])

    def flops(self, columns: int) -> Flops:
        dims, pairs = [segment.dim for segment in self.segments], self._pairs

        def cost(i: int, j: int, columns: int) -> int:
            return 2 * (self.segments[i].size if i == j else dims[i]) * dims[j] * columns

        applied = sum(cost(i, j, columns) for i, j in pairs)
        matmul = sum(cost(i, i, segment.size) for i, segment in enumerate(self.segments))
        inner = matmul + sum(cost(i, i, dims[k]) for k, i in self.couplings)
        for (i, j), k in itertools.product(self.couplings, range(len(dims))):
            if (i, k) in pairs and (k, j) in pairs:
                matmul += cost(j, j, dims[i]) if k == j else cost(i, k, dims[j])
            if (k, i) in pairs and (k, j) in pairs:
                inner += cost(i, k, dims[j])
        return Flops(apply=applied, project_outer=applied, matmul=matmul, project_inner=inner)

    def _by_segment(self, operation: Callable[..., Parts], *operands: Parts) -> Parts:
        """Returns the parts of an operation on symmetric sets, which takes each segment by itself.

        Args:
          matrix: the result, for the error of a set with couplings.
          operation: takes a segment, and its own part of each operand as a tuple; returns a tuple of one part.
          *operands: the parts of each matrix.

        Raises:
          ValueError: if there are couplings.
        """
        if self.couplings:
            raise self.not_symmetric()
        each = zip(self.segments, *operands, strict=True)
        return (*itertools.chain(*[operation(segment, *[(part,) for part in own]) for segment, *own in each]),)

    @property
    def _pairs(self) -> tuple[Pair, ...]:
        """The segments in whose rows and columns each part is."""
        indices = range(len(self.segments))
        return (*zip(indices, indices, strict=True), *self.couplings)

    def _blocks(self, parts: Parts) -> dict[Pair, jax.Array]:
        return dict(zip(self._pairs, parts, strict=True))

    def _cut(self, tensor: jax.Array, axis: int) -> list[jax.Array]:
        """Returns the segments of `tensor` along `axis`."""
        stops = list(itertools.accumulate([segment.dim for segment in self.segments]))
        return jnp.split(tensor, stops[:-1], axis)


def _add(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)

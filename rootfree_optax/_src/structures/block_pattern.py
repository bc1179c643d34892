"""Matrices that are zero outside a fixed pattern of blocks: all structures but the Toeplitz ones.

The indices are cut into consecutive segments. A segment's own block, on the diagonal, is dense, diagonal or
block-diagonal. A coupling (i, j) of two segments says that the block in the rows of i and the columns of j is dense.
The set is closed under product if the couplings are transitive; without cycles, no coupling has its mirror image in
the set.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.structures import elimination
from rootfree_optax._src.structures.base import Flops, Parts, Structure
from rootfree_optax._src.structures.elimination import Pair
from rootfree_optax._src.structures.segment import Segment, apply_matrix, einsum_along


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


@dataclasses.dataclass(frozen=True, repr=False)
class BlockPattern(Structure):
    """Matrices that are zero outside a pattern of blocks.

    The parts are those of the segments, then a matrix [rows in i, columns in j] for each coupling (i, j).

    Args:
      segments: what the diagonal is cut into, none of them empty.
      couplings: the pairs (i, j), i ≠ j, of segments with a dense block between them, transitive and without cycles.
      name: for tables; patterns that differ in nothing else are equal.

    Raises:
      ValueError: if there is no segment, one is empty, or the set is not closed under product.

    Example:
      >>> import jax.numpy as jnp
      >>> arrow = BlockPattern((Segment(count=1, size=1), Segment(count=2, size=1)), couplings=((0, 1),))
      >>> arrow.to_dense((jnp.array([1.0]), jnp.array([2.0, 3.0]), jnp.array([[4.0, 5.0]]))).tolist()
      [[1.0, 4.0, 5.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    """

    segments: tuple[Segment, ...]
    couplings: tuple[Pair, ...] = ()
    name: str = dataclasses.field(default="pattern", compare=False)

    def __post_init__(self) -> None:
        if not self.segments or any(min(segment.count, segment.size) < 1 for segment in self.segments):
            raise ValueError(f"a pattern must have at least one segment, and none empty, got {self.segments}.")
        indices = range(len(self.segments))
        if len(set(self.couplings)) < len(self.couplings) or not {*itertools.chain(*self.couplings)} <= {*indices}:
            raise ValueError(f"couplings must be distinct pairs of {indices}, got {self.couplings}.")
        for (i, k), (m, j) in itertools.product(self.couplings, repeat=2):
            if k == m and (i == j or (i, j) not in self.couplings):
                raise ValueError(
                    f"couplings must be transitive and without cycles, got {self.couplings}: the product of the "
                    f"blocks {(i, k)} and {(m, j)} falls outside the set."
                )

    @property
    def dim(self) -> int:
        """The number of rows, d."""
        return sum(segment.dim for segment in self.segments)

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the segments' parts, then of the couplings."""
        couplings = ((self.segments[i].dim, self.segments[j].dim) for i, j in self.couplings)
        return (*(segment.part_shape for segment in self.segments), *couplings)

    def identity(self, dtype: DTypeLike) -> Parts:
        """Returns the parts of I, of `dtype`."""
        couplings = self.zeros(dtype)[len(self.segments) :]
        return (*(segment.identity(dtype) for segment in self.segments), *couplings)

    def to_dense(self, parts: Parts) -> jax.Array:
        """Returns the matrix, [d, d], in the parts' dtype."""
        blocks, indices = self._blocks(parts), range(len(self.segments))

        def dense(i: int, j: int) -> jax.Array:
            zeros = jnp.zeros((self.segments[i].dim, self.segments[j].dim), parts[0].dtype)
            return self.segments[i].to_dense(blocks[i, i]) if i == j else blocks.get((i, j), zeros)

        return jnp.block([[dense(i, j) for j in indices] for i in indices])

    def matmul(self, left: Parts, right: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of L R: (L R)ᵢⱼ = Σₖ Lᵢₖ Rₖⱼ."""
        lefts, rights = self._blocks(left), self._blocks(right)

        def product(i: int, k: int, j: int) -> jax.Array:
            if k == j:  # Lᵢⱼ is the dense one: (Rⱼⱼᵀ Lᵢⱼᵀ)ᵀ
                return self._apply((j, j), rights[j, j], lefts[i, j], axis=1, transposed=True, precision=precision)
            return self._apply((i, k), lefts[i, k], rights[k, j], axis=0, precision=precision)

        segments = (
            segment.matmul(lefts[i, i], rights[i, i], precision=precision) for i, segment in enumerate(self.segments)
        )
        couplings = (
            _total(product(i, k, j) for k in range(len(self.segments)) if (i, k) in lefts and (k, j) in rights)
            for i, j in self.couplings
        )
        return (*segments, *couplings)

    @property
    def is_symmetric(self) -> bool:
        """Whether no block has its mirror image outside the pattern."""
        return not self.couplings

    def square(self, parts: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of K Kᵀ, segment by segment."""
        if not self.is_symmetric:
            return super().square(parts, precision=precision)
        return tuple(s.square(part, precision=precision) for s, part in zip(self.segments, parts, strict=True))

    @property
    def has_inverse_root(self) -> bool:
        """Whether all that couples to one segment is dense as a whole, with the blocks between its segments."""
        return elimination.is_possible(self.segments, self.couplings)

    def times_inverse_root(
        self, parts: Parts, excess: Parts, *, shift: ArrayLike, precision: jax.lax.PrecisionLike = None
    ) -> Parts:
        """Returns the parts of K C: segment by segment, those with couplings by eliminating what they couple to."""
        if not self.has_inverse_root:
            return super().times_inverse_root(parts, excess, shift=shift, precision=precision)
        if self.couplings:
            blocks = self._blocks(excess)
            root = elimination.inverse_root_within(self.segments, self.couplings, blocks, shift=shift)
            return self.matmul(tuple(map(upcast, parts)), tuple(root[pair] for pair in blocks), precision=precision)
        return tuple(
            segment.times_inverse_root(part, own, shift=shift, precision=precision)
            for segment, part, own in zip(self.segments, parts, excess, strict=True)
        )

    def apply(
        self, parts: Parts, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by K: (K X)ᵢ = Σⱼ Kᵢⱼ Xⱼ."""
        return self._multiplied(parts, tensor, axis, transposed=False, precision=precision)

    def apply_transposed(
        self, parts: Parts, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by Kᵀ: (Kᵀ X)ᵢ = Σⱼ Kⱼᵢᵀ Xⱼ."""
        return self._multiplied(parts, tensor, axis, transposed=True, precision=precision)

    def project_outer(self, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(X Xᵀ): Xᵢ Xᵢᵀ within a segment, 2 Xᵢ Xⱼᵀ for a coupling."""
        pieces = self._cut(tensor, axis)

        def outer(i: int, j: int) -> jax.Array:
            return einsum_along("<I>,<J>->IJ", axis, tensor.ndim, pieces[i], pieces[j], precision=precision)

        segments = (s.project_outer(x, axis, precision=precision) for s, x in zip(self.segments, pieces, strict=True))
        return (*segments, *(2 * outer(i, j) for i, j in self.couplings))

    def project_inner(self, parts: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(Kᵀ K): Σₖ Kₖᵢᵀ Kₖᵢ within a segment, 2 Σₖ Kₖᵢᵀ Kₖⱼ for a coupling (i, j)."""
        blocks = self._blocks(parts)

        def within(i: int, segment: Segment) -> jax.Array:
            own = segment.inner(blocks[i, i], precision=precision)
            others = (blocks[k, j] for k, j in self.couplings if j == i)
            return _total((own, *(segment.project_outer(block, 1, precision=precision) for block in others)))

        def between(i: int, j: int) -> jax.Array:
            rows = (k for k in range(len(self.segments)) if (k, i) in blocks and (k, j) in blocks)
            return _total(
                self._apply((k, i), blocks[k, i], blocks[k, j], axis=0, transposed=True, precision=precision)
                for k in rows
            )

        segments = (within(i, segment) for i, segment in enumerate(self.segments))
        return (*segments, *(2 * between(i, j) for i, j in self.couplings))

    def squared_norm(self, parts: Parts) -> jax.Array:
        """Returns ‖K‖²_F, the sum of the squares of all that is stored."""
        return _total(jnp.sum(jnp.square(upcast(part))) for part in parts)

    def flops(self, columns: int) -> Flops:
        """Returns what the operations cost, on a tensor of d × `columns` entries."""
        dims = [segment.dim for segment in self.segments]
        pairs = (*((i, i) for i in range(len(dims))), *self.couplings)

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

    def _blocks(self, parts: Parts) -> dict[Pair, jax.Array]:
        """Returns the blocks that are not zero, by the segments of their rows and of their columns."""
        diagonal = ((i, i) for i in range(len(self.segments)))
        return dict(zip((*diagonal, *self.couplings), parts, strict=True))

    def _cut(self, tensor: jax.Array, axis: int) -> list[jax.Array]:
        """Returns the segments of `tensor` along `axis`."""
        if len(self.segments) == 1:
            return [tensor]
        stops = list(itertools.accumulate(segment.dim for segment in self.segments))
        return jnp.split(tensor, stops[:-1], axis)

    def _multiplied(
        self, parts: Parts, tensor: jax.Array, axis: int, *, transposed: bool, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by K or Kᵀ, block by block."""
        blocks, pieces = self._blocks(parts), self._cut(tensor.astype(parts[0].dtype), axis)

        def row(i: int) -> jax.Array:
            pairs = {j: (j, i) if transposed else (i, j) for j in range(len(pieces))}
            return _total(
                self._apply(pair, blocks[pair], pieces[j], axis, transposed=transposed, precision=precision)
                for j, pair in pairs.items()
                if pair in blocks
            )

        rows = [row(i) for i in range(len(pieces))]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis)

    def _apply(
        self,
        pair: Pair,
        block: jax.Array,
        tensor: jax.Array,
        axis: int,
        *,
        transposed: bool = False,
        precision: jax.lax.PrecisionLike,
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by one block, or by its transpose."""
        i, j = pair
        by_block = self.segments[i].apply if i == j else apply_matrix
        return by_block(block, tensor, axis, transposed=transposed, precision=precision)

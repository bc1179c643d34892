"""The inverse root within block patterns with couplings, column by column, by the elimination of a dense corner.

For symmetric M ≥ a·I, let C be the matrix of the set with the least Tr(CᵀMC) − 2 log|det C|. If the set has a root of
M⁻¹, then C Cᵀ = M⁻¹. Otherwise C Cᵀ is nearest to M⁻¹ in Kullback–Leibler divergence between normal distributions of
mean zero with these covariances (Schäfer, Katzfuss and Owhadi 2021, for segments of one index). The objective is a sum
over columns. The columns of a segment j are zero outside of the rows of j and of its corner R: the segments that they
couple to. The least is at

    Y = M_RR⁻¹ M_Rj      C_jj = (M_jj − M_Rjᵀ Y)^(−1/2)      C_Rj = −Y C_jj

where the root of the Schur complement of M_RR is taken within the segment. M_RR⁻¹ is the square of an inverse root from
products. All of M_RR must be stored: the segments of a corner must be dense, with couplings between them.

A corner is small. So all this is in the accumulation dtype at the highest precision: the Schur complement is a
difference of numbers that may be large and nearly equal.

References:
  Schäfer, Katzfuss and Owhadi, Sparse Cholesky Factorization by Kullback–Leibler Minimization, SIAM Journal on
  Scientific Computing 43(3), 2021, https://arxiv.org/abs/2004.14455.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.numerics import inverse_root
from rootfree_optax._src.numerics.products import matmul
from rootfree_optax._src.structures.block_diagonal import BlockDiagonal, multiply_along

Pair: TypeAlias = tuple[int, int]
Blocks: TypeAlias = Mapping[Pair, jax.Array]

_PRECISION = jax.lax.Precision.HIGHEST


def corner_of(column: int, couplings: Sequence[Pair]) -> tuple[int, ...]:
    """Returns the segments that a segment's columns couple to, in order."""
    return tuple(sorted(i for i, j in couplings if j == column))


def is_possible(segments: Sequence[BlockDiagonal], couplings: Sequence[Pair]) -> bool:
    """Returns whether every corner is dense: the blocks of its segments, and the blocks between them."""
    stored = {*couplings, *((j, i) for i, j in couplings)}
    corners = [corner_of(j, couplings) for j in range(len(segments))]
    return all(segments[i].is_dense for corner in corners for i in corner) and all(
        pair in stored for corner in corners for pair in itertools.combinations(corner, 2)
    )


def inverse_root_within(
    segments: Sequence[BlockDiagonal], couplings: Sequence[Pair], excess: Blocks, *, shift: ArrayLike
) -> dict[Pair, jax.Array]:
    """Returns the blocks of the C of the pattern with the least Tr(CᵀMC) − 2 log|det C|, for M = a·I + E.

    No column of C is longer than a^(−1/2), and C is invertible. If the condition number of a corner may be above
    `LARGEST_CONDITION`, E is scaled until it is not.

    Args:
      segments: the structures of the blocks on the diagonal.
      couplings: the pairs (i, j) of segments with a block between them.
      excess: the blocks of Π̂(E), E symmetric positive semidefinite. The projection counts couplings twice.
      shift: a > 0, a scalar.
    """
    blocks = {(i, j): block if i == j else block / 2 for (i, j), block in excess.items()}
    shrink = _shrink(segments, couplings, blocks, shift)
    blocks = {pair: shrink * block for pair, block in blocks.items()}
    result: dict[Pair, jax.Array] = {}
    for j, segment in enumerate(segments):
        corner = corner_of(j, couplings)
        if not corner:
            result[j, j] = _root(segment, blocks[j, j], shift)
            continue
        right = jnp.concatenate([blocks[i, j] for i in corner])
        result[j, j], coupled = _column(segment, blocks[j, j], right, _dense(segments, corner, blocks), shift)
        stops = itertools.accumulate([segments[i].dim for i in corner[:-1]])
        result |= {(i, j): piece for i, piece in zip(corner, jnp.split(coupled, [*stops]), strict=True)}
    return result


def _root(segment: BlockDiagonal, excess: jax.Array, shift: ArrayLike) -> jax.Array:
    identity = segment.identity(excess.dtype)
    return segment.times_inverse_root(identity, (excess,), shift=shift, precision=_PRECISION)[0]


def _shrink(
    segments: Sequence[BlockDiagonal], couplings: Sequence[Pair], blocks: Blocks, shift: ArrayLike
) -> jax.Array:
    """Returns the s ≤ 1 with which the polynomials cover every root that s·E needs."""
    bound = lambda block: jnp.max(inverse_root.norm_bound(block, precision=_PRECISION))
    norms = []
    for j in sorted({j for _, j in couplings}):
        norm = bound(_dense(segments, corner_of(j, couplings), blocks))
        norms.append(norm if segments[j].size == 1 else norm + bound(blocks[j, j]))
    return inverse_root.shrink_to_cover(jnp.max(jnp.stack(norms)), shift=shift)


def _dense(segments: Sequence[BlockDiagonal], corner: Sequence[int], blocks: Blocks) -> jax.Array:
    """Returns the symmetric matrix of a corner, [rows, rows]."""
    within = lambda i, j: blocks[i, j] if (i, j) in blocks else blocks[j, i].T
    own = lambda i: blocks[i, i].reshape(segments[i].dim, -1)  # one dense block, see `is_possible`
    return jnp.block([[own(i) if i == j else within(i, j) for j in corner] for i in corner])


def _column(
    segment: BlockDiagonal, own: jax.Array, right: jax.Array, within: jax.Array, shift: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns C_jj, and C_Rj [rows of the corner, columns], given E_jj, E_Rj and E_RR."""
    product = lambda left, right: matmul(left, right, precision=_PRECISION)
    identity = jnp.eye(len(within), dtype=within.dtype)
    root = inverse_root.times_inverse_root(identity, within, shift=shift, precision=_PRECISION)
    times_inverse = lambda right: product(root, product(root, right))
    residual = lambda y: right - jnp.asarray(shift, y.dtype) * y - product(within, y)
    y = times_inverse(right)
    y = y + times_inverse(residual(y))  # squares the error of the inverse root's polynomials
    # For every Y, E_jj − M_Rjᵀ Y − Yᵀ M_Rj + Yᵀ M_RR Y is at least zero, and it is stationary at the exact Y.
    explained = segment.project_product(y, right + residual(y), 1, precision=_PRECISION)
    if segment.size == 1:
        c = _root(segment, jnp.maximum(own - explained, 0), shift)
    else:
        c = _root(segment, own - (explained + jnp.matrix_transpose(explained)) / 2, shift)
    return c, -multiply_along(c, y, 1, precision=_PRECISION)

"""The exact refresh of a block pattern with couplings: each column by eliminating the dense corner that it couples to.

For symmetric M ≥ a·I, the C of the set with the least Tr(CᵀMC) − 2 log|det C| is the inverse root of M as near as the
set comes to it: C Cᵀ is M⁻¹ if the set has a root of that, and otherwise the nearest to M⁻¹ by the Kullback–Leibler
divergence of normal distributions with such covariances. The objective is a sum over columns. For those of a segment j,
which reach down (or up) to a corner R,

    Y = M_RR⁻¹ M_Rj      C_jj = (M_jj − M_Rjᵀ Y)^(−1/2)      C_Rj = −Y C_jj

with the root taken within the segment. M_RR⁻¹ is the square of an inverse root that is made of products. Everything
that this takes of M must be stored: all of M_RR, so that a corner is one dense block, or several that are coupled.

The corner is small. So all this is in the accumulation dtype, and at the highest precision: a difference of what may be
large and nearly equal is what C_jj is the root of.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.numerics import inverse_root
from rootfree_optax._src.numerics.products import matmul
from rootfree_optax._src.structures.segment import Segment, transpose

Pair: TypeAlias = tuple[int, int]
Blocks: TypeAlias = Mapping[Pair, jax.Array]

_PRECISION = jax.lax.Precision.HIGHEST


def corner_of(column: int, couplings: Sequence[Pair]) -> tuple[int, ...]:
    """Returns the segments that a segment's columns couple to, in order."""
    return tuple(sorted(i for i, j in couplings if j == column))


def is_possible(segments: Sequence[Segment], couplings: Sequence[Pair]) -> bool:
    """Returns whether every corner is dense as a whole: its own blocks, and those between them."""
    stored = {*couplings, *((j, i) for i, j in couplings)}
    return all(
        all(segments[i].count == 1 for i in corner)
        and all(pair in stored for pair in itertools.combinations(corner, 2))
        for corner in (corner_of(j, couplings) for j in range(len(segments)))
    )


def inverse_root_within(
    segments: Sequence[Segment], couplings: Sequence[Pair], excess: Blocks, *, shift: ArrayLike
) -> dict[Pair, jax.Array]:
    """Returns the blocks of the C of the pattern with the least Tr(CᵀMC) − 2 log|det C|, for M = a·I + E.

    No column of C is longer than a^(−1/2), and C is invertible. Where the condition number of a corner may be above
    `LARGEST_CONDITION`, E is shrunk as a whole until it is not.

    Args:
      segments: what the diagonal is cut into.
      couplings: the pairs (i, j) of segments with a block between them.
      excess: the blocks of Π̂(E), E symmetric positive semidefinite; those of couplings count twice.
      shift: a > 0, a scalar.
    """
    blocks = {(i, j): block if i == j else block / 2 for (i, j), block in excess.items()}
    shrink = _shrink(segments, couplings, blocks, shift)
    blocks = {pair: shrink * block for pair, block in blocks.items()}
    result: dict[Pair, jax.Array] = {}
    for j, segment in enumerate(segments):
        corner = corner_of(j, couplings)
        if corner:
            own, coupled = _column(segments, corner, j, blocks, shift)
            stops = list(itertools.accumulate(segments[i].dim for i in corner))
            result |= {(i, j): piece for i, piece in zip(corner, jnp.split(coupled, stops[:-1]), strict=True)}
        else:
            own = _root(segment, blocks[j, j], shift)
        result[j, j] = own
    return result


def _root(segment: Segment, excess: jax.Array, shift: ArrayLike) -> jax.Array:
    identity = segment.identity(excess.dtype)
    return segment.times_inverse_root(identity, excess, shift=shift, precision=_PRECISION)


def _shrink(segments: Sequence[Segment], couplings: Sequence[Pair], blocks: Blocks, shift: ArrayLike) -> jax.Array:
    """Returns the s ≤ 1 that makes every root of s·E one within what the polynomials cover."""
    bound = lambda block: jnp.max(inverse_root.norm_bound(block, precision=_PRECISION))
    norms = []
    for j in sorted({j for _, j in couplings}):
        norm = bound(_dense(segments, corner_of(j, couplings), blocks))
        norms.append(norm if segments[j].size == 1 else norm + bound(blocks[j, j]))
    return inverse_root.shrink_to_cover(jnp.max(jnp.stack(norms)), shift=shift)


def _dense(segments: Sequence[Segment], corner: Sequence[int], blocks: Blocks) -> jax.Array:
    """Returns the symmetric matrix of a corner, [rows, rows]."""
    within = lambda i, j: blocks[i, j] if (i, j) in blocks else blocks[j, i].T
    own = lambda i: blocks[i, i].reshape(segments[i].dim, -1)  # one dense block, see `is_possible`
    return jnp.block([[own(i) if i == j else within(i, j) for j in corner] for i in corner])


def _column(
    segments: Sequence[Segment], corner: Sequence[int], j: int, blocks: Blocks, shift: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns C_jj, and C_Rj [rows of the corner, columns]."""
    within, segment = _dense(segments, corner, blocks), segments[j]
    product = lambda left, right: matmul(left, right, precision=_PRECISION)
    root = inverse_root.times_inverse_root(
        jnp.eye(len(within), dtype=within.dtype), within, shift=shift, precision=_PRECISION
    )
    times_inverse = lambda right: product(root, product(root, right))
    right = jnp.concatenate([blocks[i, j] for i in corner])
    residual = lambda y: right - jnp.asarray(shift, y.dtype) * y - product(within, y)
    y = times_inverse(right)
    y = y + times_inverse(residual(y))  # squares what the inverse root's polynomials are off by
    # Whatever Y is, E_jj − M_Rjᵀ Y − Yᵀ M_Rj + Yᵀ M_RR Y is no less than zero, and stationary at the right one.
    explained = segment.project_product(y, right + residual(y), precision=_PRECISION)
    left = blocks[j, j] - (explained + transpose(explained)) / 2
    own = _root(segment, jnp.maximum(left, 0) if segment.size == 1 else left, shift)
    return own, -segment.apply(own, y, 1, precision=_PRECISION)

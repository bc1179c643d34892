"""The factors of a polar decomposition K = P U, and square roots, by matrix products: no decomposition, no inverse.

With a polynomial q for each round,

    X ← q(X Xᵀ) X                    X goes from K to U with orthonormal rows or columns, and P = (K Kᵀ)^(1/2) = K Uᵀ

(Higham 2008, chapter 8). For P, the q of each round is the best quadratic polynomial, as in `inverse_root`, for the
spectrum of X Xᵀ that the round before leaves (Amsel et al. 2025). The best polynomial for a very wide spectrum takes
some large singular values almost to zero, where products of few bits lose them. So each q is for the part of the
spectrum above 1/100 of its largest eigenvalue. Smaller eigenvalues grow almost as fast with it.

References:
  Higham, Functions of Matrices: Theory and Computation, SIAM 2008.
  Amsel, Persson, Musco and Gower, The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon
  Algorithm, 2025, https://arxiv.org/abs/2505.16932.
  Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks, 2024, https://kellerjordan.github.io/posts/muon.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import ArrayLike

from rootfree_optax._src.numerics.arithmetic import einsum, matmul, upcast
from rootfree_optax._src.numerics.inverse_root import (
    LARGEST_CONDITION,
    best_polynomials,
    bound_norm,
    size_and_unit,
    times_inverse_root,
)

_MUON = np.tile((3.4445, -4.7750, 2.0315), (5, 1))  # a, b and c of each iteration
_LARGEST_CONDITION_OF_SQUARE = 1e6  # of K Kᵀ
_LARGEST_CONDITION_OF_A_ROUND = 100
_ROUNDS = 7  # leave an error of 1e-6
_SLACK = 1.02  # for rounding errors, between the spectrum that a round leaves and the next one expects


def orthogonalize(matrix: jax.Array, *, precision: PrecisionLike = None) -> jax.Array:
    """Returns U Vᵀ for the singular value decomposition U Σ Vᵀ, roughly, by five Newton–Schulz iterations.

        X ← a·X + (b·XXᵀ + c·(XXᵀ)²) X

    with the coefficients of Jordan et al. (2024). Singular values above 0.0016·‖matrix‖_F go to [0.68, 1.21]. Smaller
    ones are multiplied by at most 485/‖matrix‖_F. A matrix of zeros stays zero. Its entries may have any size.

    Args:
      matrix: [..., m, n].
      precision: of every product.

    Returns:
      [..., m, n], in the accumulation dtype. Non-finite if `matrix` is.

    Example:
      >>> orthogonalize(jnp.array([[3e30, 0.0, 0.0], [0.0, -4e30, 0.0]])).round(1)
      Array([[ 0.7,  0. ,  0. ],
             [ 0. , -1.1,  0. ]], dtype=float32)
    """
    _, unit = size_and_unit(upcast(matrix))
    norm = jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1), keepdims=True))  # at least one, or zero
    return _orthogonalize(unit / jnp.maximum(norm, 1), _MUON, precision)


def symmetric_root(factor: jax.Array, *, precision: PrecisionLike = None) -> jax.Array:
    """Returns (K Kᵀ)^(1/2), the symmetric factor P of the polar decomposition K = P U, by 22 products.

    If the condition number of K Kᵀ is at most 1e6, the error is about 1e-5·‖P‖₂ with products in float32, 2e-3·‖P‖₂ in
    TF32 and 2e-2·‖P‖₂ in bfloat16. If it is larger, eigenvalues below 1e-3·‖P‖₂ come out too small.

    Args:
      factor: K, [..., d, d].
      precision: of every product.

    Returns:
      [..., d, d], symmetric, in the accumulation dtype. Non-finite if `factor` is.
    """
    size, unit = size_and_unit(upcast(factor))
    gram = einsum("...ij,...kj->...ik", unit, unit, precision=precision)
    square = matmul(gram, gram, precision=precision)
    top = bound_norm(square)
    shrink = 1 / jnp.where(top > 0, top, 1)
    first, others = jnp.asarray(_polynomials()[0], unit.dtype), _polynomials()[1:]
    even = first[1] * shrink * gram + first[2] * jnp.square(shrink) * square
    x = jnp.sqrt(shrink) * (first[0] * unit + matmul(even, unit, precision=precision))
    u = _orthogonalize(x, others, precision)
    return size * _symmetrize(einsum("...ij,...kj->...ik", unit, u, precision=precision))


def positive_root(matrix: jax.Array, least: ArrayLike, *, precision: PrecisionLike = None) -> jax.Array:
    """Returns M^(1/2) = M M^(−1/2) for symmetric positive definite M, by eight products, see `times_inverse_root`.

    The relative error of an eigenvalue is 6e-6 if ‖M‖₂ is 30 times `least`, 8e-4 at 100 times and 6e-2 at 1000 times.
    Roots of eigenvalues below ‖M‖_F / 1000 come out too small.

    Args:
      matrix: M, [..., d, d].
      least: a positive scalar that no eigenvalue of M is below, up to rounding.
      precision: of every product.

    Returns:
      [..., d, d], symmetric, in the accumulation dtype. Non-finite if `matrix` is.
    """
    wide = upcast(matrix)
    size, unit = size_and_unit(wide)
    norm = size * jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1), keepdims=True))
    least = jnp.maximum(jnp.asarray(least, wide.dtype), norm / LARGEST_CONDITION)
    excess = wide - least * jnp.broadcast_to(jnp.eye(wide.shape[-1], dtype=wide.dtype), wide.shape)
    return _symmetrize(times_inverse_root(wide, excess, shift=least, precision=precision))


def _orthogonalize(x: jax.Array, polynomials: np.ndarray, precision: PrecisionLike) -> jax.Array:
    """Returns X after a round with each polynomial, by products with the smaller one of XXᵀ and XᵀX."""
    is_wide = x.shape[-2] <= x.shape[-1]
    subscripts = "...ij,...kj->...ik" if is_wide else "...ji,...jk->...ik"

    def improve(x: jax.Array, q: jax.Array) -> tuple[jax.Array, None]:
        gram = einsum(subscripts, x, x, precision=precision)
        even = q[1] * gram + q[2] * matmul(gram, gram, precision=precision)
        left, right = (even, x) if is_wide else (x, even)
        return q[0] * x + matmul(left, right, precision=precision), None

    return jax.lax.scan(improve, x, jnp.asarray(polynomials, x.dtype))[0]


def _symmetrize(matrix: jax.Array) -> jax.Array:
    return (matrix + jnp.matrix_transpose(matrix)) / 2


@functools.cache
def _polynomials() -> np.ndarray:
    """Returns the coefficients of the q of each round in the order of rising powers, [rounds, 3]."""
    low, high, rounds = np.array([1 / _LARGEST_CONDITION_OF_SQUARE]), np.ones(1), []
    for _ in range(_ROUNDS):
        start = np.maximum(low, high / _LARGEST_CONDITION_OF_A_ROUND)
        polynomials, error = best_polynomials(start, _SLACK * high, degree=2)
        rounds.append(polynomials[0])
        # Below `start`, t·q(t)² rises with t.
        low = np.minimum((1 - error) ** 2, low * np.polynomial.polynomial.polyval(low, polynomials[0]) ** 2)
        high = (1 + error) ** 2
    return np.stack(rounds)

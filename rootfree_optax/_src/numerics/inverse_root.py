"""K (a·I + E)^(−1/2) for symmetric positive semidefinite E, by eight matrix products: no inverse, no decomposition.

M = a·I + E is divided by a bound on its largest eigenvalue. Then t ← t·q(t)² with a polynomial q, twice, takes the
spectrum of t = M to one, and the product of the two q(t) is the inverse root of M: the coupled iteration of Higham
(2008, chapters 6 and 7). The first q is the best polynomial for the condition number of M, the second the best for what
the first one leaves, as in the Polar Express of Amsel et al. (2025). The best is the one with the least largest error,
by the exchange algorithm of Remez (Trefethen 2019, chapter 10).

Every matrix on the way is a multiple of the identity, held in the accumulation dtype, plus a remainder. Products take
the remainders in K's dtype. Where E vanishes, the result has the accuracy of the accumulation dtype, even if K is in
half precision.

References:
  Higham, Functions of Matrices: Theory and Computation, SIAM 2008.
  Trefethen, Approximation Theory and Approximation Practice, extended edition, SIAM 2019.
  Amsel, Persson, Musco and Gower, The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon
  Algorithm, 2025, https://arxiv.org/abs/2505.16932.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import ArrayLike

from rootfree_optax._src.numerics.arithmetic import matmul, upcast

Product: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]

LARGEST_CONDITION = 1024.0  # of the spectra in the table, whose error there is 6%
_SMALLEST_CONDITION = 4.0
_ROWS_PER_OCTAVE = 4
_DEGREE = 4  # of both polynomials: the most accurate choice for eight matrix products
_SLACK = 1.01  # the norm bound is one for exact products, but products in half precision may be too small by as much


class Shifted(NamedTuple):
    """The matrix scalar·I + matrix, with scalar [..., 1, 1] and matrix [..., d, d]."""

    scalar: jax.Array
    matrix: jax.Array


def elementwise(factor: jax.Array, excess: jax.Array, *, shift: ArrayLike) -> jax.Array:
    """Returns K (a·I + E)^(−1/2) of diagonal matrices, each held as [..., d]. Non-finite where `excess` is.

    Where E is close to −a·I, its digits are lost, and their resolution is what is left.
    """
    a = jnp.asarray(shift, excess.dtype)
    root = jax.lax.rsqrt(jnp.maximum(a + excess, jnp.finfo(a.dtype).eps * a))
    return upcast(factor) * jnp.where(jnp.isfinite(excess), root, jnp.nan)


def times_inverse_root(
    factor: jax.Array, excess: jax.Array, *, shift: ArrayLike, precision: PrecisionLike = None
) -> jax.Array:
    """Returns K (a·I + E)^(−1/2).

    Let κ be the bound on the condition number that follows from ‖E‖₂ ≤ ‖E²‖_F^(1/2), a bound that is at most d^(1/4)
    times too large. The relative error of the inverse root is 6e-6 at κ = 30, 8e-4 at 100 and 6e-2 at 1024, or the
    resolution of the dtypes: in bfloat16 about 1e-2 at 100, in the directions in which E does not vanish. If κ is above
    1024, E is scaled until κ is 1024.

    Args:
      factor: K, [..., d, d].
      excess: E, [..., d, d], symmetric positive semidefinite, in the accumulation dtype.
      shift: a > 0, a scalar.
      precision: of every product.

    Returns:
      [..., d, d], in the accumulation dtype. Non-finite if `excess` is.
    """
    table, a = inverse_root_table(), jnp.asarray(shift, excess.dtype)
    multiply = functools.partial(matmul, dtype=factor.dtype, precision=precision)
    size, unit = size_and_unit(excess)
    square = multiply(unit, unit)
    largest = size * bound_norm(square)
    shrink = jnp.minimum(1, (LARGEST_CONDITION - 1) * a / jnp.maximum(largest, a))
    top = a + shrink * largest
    scale = shrink * size / top
    # As jnp.searchsorted does, which fails inside of some jax.shard_map.
    below = jnp.reshape(jnp.asarray(table.conditions[:-1], a.dtype), (1,) * top.ndim + (-1,))
    row = jnp.sum(jnp.expand_dims(top / a, -1) > below, axis=-1, dtype=jnp.int32)
    first, second = jnp.asarray(table.polynomials, a.dtype)[:, :, row]  # each [5, ..., 1, 1]

    t = Shifted(a / top, scale * unit)
    q = _evaluate(first, t, jnp.square(scale) * square, multiply)
    k = _times(upcast(factor), q, multiply)
    tq = _product(t, q, multiply)
    t = Shifted(tq.scalar * q.scalar, tq.scalar * q.matrix + _times(tq.matrix, q, multiply))
    q = _evaluate(second, t, multiply(t.matrix, t.matrix), multiply)
    return _times(k, q, multiply) * jax.lax.rsqrt(top)


def size_and_unit(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest absolute entry, and the matrix divided by it, so that no product overflows."""
    size = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    return size, matrix / jnp.where(size > 0, size, 1)


def bound_norm(square: jax.Array) -> jax.Array:
    """Returns a bound on ‖E‖₂ for symmetric E, given E², [..., d, d]: ‖E²‖_F^(1/2), and a margin for rounding.

    It is at most 1.01·d^(1/4) times too large: unlike ‖E‖_F, close to ‖E‖₂ even if all eigenvalues are equal.

    Returns:
      [..., 1, 1].
    """
    return _SLACK * jnp.sum(jnp.square(square), axis=(-2, -1), keepdims=True) ** 0.25


def _times(matrix: jax.Array, q: Shifted, multiply: Product) -> jax.Array:
    return q.scalar * matrix + multiply(matrix, q.matrix)


def _product(left: Shifted, right: Shifted, multiply: Product) -> Shifted:
    matrix = left.scalar * right.matrix + right.scalar * left.matrix + multiply(left.matrix, right.matrix)
    return Shifted(left.scalar * right.scalar, matrix)


def _evaluate(polynomial: jax.Array, t: Shifted, square: jax.Array, multiply: Product) -> Shifted:
    """Returns lead·(t² + a₁·t + b₁)·(t² + a₂·t + b₂) by one product, given the square of the remainder of t."""
    lead, a1, b1, a2, b2 = polynomial
    left, right = [
        Shifted(t.scalar * (t.scalar + a) + b, (2 * t.scalar + a) * t.matrix + square) for a, b in ((a1, b1), (a2, b2))
    ]
    whole = _product(left, right, multiply)
    return Shifted(lead * whole.scalar, lead * whole.matrix)


class Table(NamedTuple):
    """Polynomials for inverse roots, a row for each condition number.

    With t₁ = t and t₂ = t₁·q₁(t₁)², the product q₁(t₁)·q₂(t₂) is close to t^(−1/2). Each polynomial is
    lead·(t² + a₁·t + b₁)·(t² + a₂·t + b₂) with positive factors. A sum of powers would lose digits to cancellation.

    Attributes:
      conditions: κ, [rows]. A row is for spectra within [1/κ, 1].
      polynomials: lead, a₁, b₁, a₂ and b₂ of both polynomials, [2, 5, rows].
    """

    conditions: np.ndarray
    polynomials: np.ndarray


@functools.cache
def inverse_root_table() -> Table:
    """Returns the polynomials for spectra of condition numbers up to `LARGEST_CONDITION`."""
    rows = round(np.log2(LARGEST_CONDITION / _SMALLEST_CONDITION) * _ROWS_PER_OCTAVE) + 1
    conditions = np.geomspace(_SMALLEST_CONDITION, LARGEST_CONDITION, rows)
    first, errors = best_polynomials(1 / conditions, np.ones(rows), _DEGREE)
    second, _ = best_polynomials((1 - errors) ** 2, (1 + errors) ** 2, _DEGREE)
    return Table(conditions, np.stack([factorize(first).T, factorize(second).T]))


def best_polynomials(low: np.ndarray, high: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the polynomials q of a given degree with the least largest |1 − √t·q(t)| on intervals [low, high].

    By the exchange algorithm of Remez: the best polynomial's error takes its largest value degree + 2 times, with
    alternating signs (Trefethen 2019, chapter 10).

    Args:
      low: positive, [rows].
      high: above `low`, [rows].
      degree: at least one.

    Returns:
      The coefficients in the order of rising powers, [rows, degree + 1], and the largest errors, [rows].

    Example:
      >>> coefficients, errors = best_polynomials(np.array([0.5]), np.array([1.0]), 1)
      >>> print(coefficients.round(3), errors.round(3))
      [[ 1.788 -0.81 ]] [0.022]
    """
    # Points in √t, which lie dense at both ends, as the extrema do.
    middle, radius = (np.sqrt(high) + np.sqrt(low)) / 2, (np.sqrt(high) - np.sqrt(low)) / 2
    root = middle[:, None] + radius[:, None] * np.cos(np.linspace(np.pi, 0, 4000))
    basis = root[..., None] ** (2 * np.arange(degree + 1) + 1)
    signs = np.broadcast_to((-1.0) ** np.arange(degree + 2)[:, None], (len(low), degree + 2, 1))
    chosen = np.linspace(0, root.shape[1] - 1, degree + 2).round().astype(int)[None].repeat(len(low), axis=0)
    best, least = np.zeros((len(low), degree + 1)), np.full(len(low), np.inf)
    for _ in range(20):
        # Levels the error at the chosen points, then exchanges them for the extrema between its changes of sign.
        system = np.concatenate([np.take_along_axis(basis, chosen[..., None], 1), signs], axis=-1)
        coefficients = np.linalg.solve(system, np.ones((len(low), degree + 2, 1)))[:, :-1]
        error = 1 - (basis @ coefficients)[..., 0]
        largest = np.abs(error).max(axis=1)
        is_better = largest < least
        best, least = np.where(is_better[:, None], coefficients[..., 0], best), np.minimum(largest, least)
        sign = np.sign(error)
        runs = np.cumsum(np.diff(sign, axis=1, prepend=sign[:, :1]) != 0, axis=1)
        goes_on = is_better & (runs[:, -1] == degree + 1)  # more changes of sign are due to rounding
        if not goes_on.any():
            break
        extrema = [np.where(runs == run, np.abs(error), -1).argmax(axis=1) for run in range(degree + 2)]
        chosen = np.where(goes_on[:, None], np.stack(extrema, axis=1), chosen)
    return best, least


def factorize(polynomials: np.ndarray) -> np.ndarray:
    """Returns the leading coefficient, then a and b of each factor t² + a·t + b, of polynomials without real roots.

    Args:
      polynomials: the coefficients in the order of rising powers, [rows, degree + 1].

    Returns:
      [rows, degree + 1].

    Raises:
      ValueError: if a polynomial has a real root.
    """
    roots = np.stack([np.roots(polynomial[::-1]) for polynomial in polynomials])
    if np.any(np.sum(roots.imag > 0, axis=1) * 2 != roots.shape[1]):
        raise ValueError(f"the polynomials must be without real roots, got roots {roots}.")
    upper = roots[roots.imag > 0].reshape(len(roots), -1)
    factors = np.stack([-2 * upper.real, np.abs(upper) ** 2], axis=-1)
    return np.concatenate([polynomials[:, -1:], factors.reshape(len(roots), -1)], axis=1)

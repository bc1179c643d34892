"""K (a·I + E)^(−1/2) from eight matrix products, for symmetric positive semidefinite E: no inverse, no decomposition.

The matrix is divided by a bound on its spectrum and goes through those polynomials q of `minimax` that fit its
condition number: t ← t·q(t)² brings all eigenvalues to one, and the product of all q(t) is the inverse root.

Every matrix on the way is a multiple of the identity, held in the accumulation dtype, plus a remainder, and products
take the remainders in K's dtype. So where E vanishes, which it does but for the few directions of one mini-batch, the
result has the accumulation dtype's accuracy even with K in half precision.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.products import matmul

# The bound on the spectrum is one on the exact matrix; its entries in half precision may be off by as much.
_SLACK = 1.01


Product: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


class Shifted(NamedTuple):
    """The matrix scalar·I + matrix, with scalar [..., 1, 1] and matrix [..., d, d]."""

    scalar: jax.Array
    matrix: jax.Array


def elementwise(factor: jax.Array, excess: jax.Array, *, shift: ArrayLike) -> jax.Array:
    """Returns K (a·I + E)^(−1/2) of diagonal matrices, each held as [..., d]. Not finite where `excess` is not."""
    root = jax.lax.rsqrt(jnp.asarray(shift, excess.dtype) + excess)
    return upcast(factor) * jnp.where(jnp.isfinite(excess), root, jnp.nan)


def norm_bound(matrix: jax.Array, *, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Returns a bound on ‖E‖₂ for symmetric E [..., d, d], at most 1.01·d^(1/4) times as large, as [..., 1, 1]."""
    size, unit = _size_and_unit(matrix)
    return size * _unit_norm_bound(matmul(unit, unit, precision=precision))


def shrink_to_cover(norm: jax.Array, *, shift: ArrayLike) -> jax.Array:
    """Returns the s ≤ 1 that brings the condition number of a·I + s·E within `LARGEST_CONDITION`, ‖E‖₂ ≤ `norm`."""
    a = jnp.asarray(shift, norm.dtype)
    return jnp.minimum(1, (LARGEST_CONDITION - 1) * a / jnp.maximum(norm, a))


def times_inverse_root(
    factor: jax.Array, excess: jax.Array, *, shift: ArrayLike, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Returns K (a·I + E)^(−1/2).

    With κ the condition number as far as ‖E‖₂ is known (the bound ‖E²‖_F^(1/2) is at most d^(1/4) times as large), the
    relative error of the inverse root is 4e-6 at κ = 30, 6e-4 at 100 and 6e-2 at 1024, or what the dtypes resolve: in
    bfloat16 about 1e-2 at 100, along the directions in which E does not vanish. Where κ may be above 1024, E is shrunk
    as a whole until it is not.

    Args:
      factor: K, [..., d, d].
      excess: E, [..., d, d], symmetric positive semidefinite, in the accumulation dtype.
      shift: a > 0, a scalar.
      precision: of every product.

    Returns:
      [..., d, d], in the accumulation dtype. Not finite where `excess` is not.
    """
    table = inverse_root_table()
    multiply = functools.partial(_multiply, dtype=factor.dtype, precision=precision)
    size, unit = _size_and_unit(excess)
    square = multiply(unit, unit)
    a = jnp.asarray(shift, excess.dtype)
    largest = size * _unit_norm_bound(square)
    shrink = shrink_to_cover(largest, shift=a)
    top = a + shrink * largest
    scale = shrink * size / top
    # As jnp.searchsorted does, which fails inside of some jax.shard_map.
    below = jnp.reshape(jnp.asarray(table.conditions[:-1], a.dtype), (1,) * top.ndim + (-1,))
    row = jnp.sum(jnp.expand_dims(top / a, -1) > below, axis=-1, dtype=jnp.int32)
    of_row = lambda values: jnp.asarray(values, a.dtype)[row]

    t, square, k = Shifted(a / top, scale * unit), jnp.square(scale) * square, upcast(factor)
    for is_last, lead, quadratics in zip((False, True), table.leads, table.quadratics, strict=True):
        q = _polynomial(of_row(lead), of_row(quadratics), t, square, multiply)
        k = _times(k, q, multiply)
        if not is_last:
            t = _times_square(t, q, multiply)
            square = multiply(t.matrix, t.matrix)
    return k * jax.lax.rsqrt(top)


def _size_and_unit(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest entry, and the matrix divided by it: its squares would overflow where it does not."""
    size = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    return size, matrix / jnp.where(size > 0, size, 1)


def _unit_norm_bound(square: jax.Array) -> jax.Array:
    """Returns ‖E²‖_F^(1/2), no less than ‖E‖₂, which unlike ‖E‖_F is close to it even for a flat spectrum."""
    return _SLACK * jnp.sum(jnp.square(square), axis=(-2, -1), keepdims=True) ** 0.25


def _multiply(left: jax.Array, right: jax.Array, *, dtype: jnp.dtype, precision: jax.lax.PrecisionLike) -> jax.Array:
    return matmul(left.astype(dtype), right.astype(dtype), precision=precision)


def _times(matrix: jax.Array, q: Shifted, multiply: Product) -> jax.Array:
    return q.scalar * matrix + multiply(matrix, q.matrix)


def _times_square(t: Shifted, q: Shifted, multiply: Product) -> Shifted:
    """Returns t·q² for t and q that commute."""
    tq = _product(t, q, multiply)
    return Shifted(tq.scalar * q.scalar, tq.scalar * q.matrix + _times(tq.matrix, q, multiply))


def _product(left: Shifted, right: Shifted, multiply: Product) -> Shifted:
    matrix = left.scalar * right.matrix + right.scalar * left.matrix + multiply(left.matrix, right.matrix)
    return Shifted(left.scalar * right.scalar, matrix)


def _polynomial(lead: jax.Array, quadratics: jax.Array, t: Shifted, square: jax.Array, multiply: Product) -> Shifted:
    """Returns lead·Π(t² + a·t + b), given the square of t's remainder, by one product less than there are factors."""
    a, b = quadratics[..., 0], quadratics[..., 1]  # [..., 1, 1, factors]
    factors = [
        Shifted(t.scalar * (t.scalar + a[..., j]) + b[..., j], (2 * t.scalar + a[..., j]) * t.matrix + square)
        for j in range(quadratics.shape[-2])
    ]
    whole = functools.reduce(functools.partial(_product, multiply=multiply), factors)
    return Shifted(lead * whole.scalar, lead * whole.matrix)


# The most accurate choice for eight matrix products in all (see `inverse_root`).
DEGREES = (4, 4)
# What the polynomials cover, to 8%. A wider spectrum must be narrowed first.
LARGEST_CONDITION = 1024.0
_SMALLEST_CONDITION = 4.0
_ROWS_PER_OCTAVE = 4


class Table(NamedTuple):
    """Polynomials for ever wider spectra.

    The k-th polynomial qₖ is to be taken of tₖ, where t₀ = t and tₖ₊₁ = tₖ·qₖ(tₖ)²; the product of all qₖ(tₖ) then is
    near t^(−1/2). Each is held as lead·Π(t² + a·t + b), of positive factors: the terms of a sum would cancel.

    Attributes:
      conditions: [rows], κ. Row i is for spectra within [1/κᵢ, 1].
      leads: for each polynomial an array [rows].
      quadratics: for each polynomial an array [rows, degree / 2, 2] of a and b.
      errors: [rows], the largest |1 − √t·Πqₖ(tₖ)| on the row's spectra.
    """

    conditions: np.ndarray
    leads: tuple[np.ndarray, ...]
    quadratics: tuple[np.ndarray, ...]
    errors: np.ndarray


def inverse_root_polynomial(low: float, high: float, degree: int) -> tuple[np.ndarray, float]:
    """Returns the q of a given degree with the least largest |1 − √t·q(t)| on [low, high], by Remez' exchange.

    Args:
      low: positive.
      high: above `low`.
      degree: at least one.

    Returns:
      The coefficients by rising powers, and that largest error, which is attained degree + 2 times.

    Example:
      >>> coefficients, error = inverse_root_polynomial(0.5, 1.0, 1)
      >>> print(coefficients.round(3), f"{error:.3f}")
      [ 1.788 -0.81 ] 0.022
    """
    # Points in √t, where the extrema are, dense at both ends.
    middle, radius = (np.sqrt(high) + np.sqrt(low)) / 2, (np.sqrt(high) - np.sqrt(low)) / 2
    root = middle + radius * np.cos(np.linspace(np.pi, 0, 4000))
    basis = root[:, None] ** (2 * np.arange(degree + 1) + 1)
    signs = (-1.0) ** np.arange(degree + 2)
    chosen = np.linspace(0, len(root) - 1, degree + 2).round().astype(int)
    best, least = np.zeros(degree + 1), np.inf
    for _ in range(20):
        coefficients = np.linalg.solve(np.column_stack([basis[chosen], signs]), np.ones(degree + 2))[:-1]
        error = 1 - basis @ coefficients
        largest = np.abs(error).max()
        if largest >= least:
            break
        best, least = coefficients, largest
        runs = np.split(np.arange(len(root)), np.flatnonzero(np.diff(np.sign(error))) + 1)
        if len(runs) != len(chosen):  # what is left is rounding
            break
        chosen = np.array([run[np.argmax(np.abs(error[run]))] for run in runs])
    return best, float(least)


def quadratic_factors(coefficients: np.ndarray) -> np.ndarray:
    """Returns a and b of the factors t² + a·t + b, [degree / 2, 2], of a polynomial without real roots."""
    roots = np.roots(coefficients[::-1])
    upper = roots[roots.imag > 0]
    if 2 * len(upper) != len(roots):
        raise ValueError(f"the polynomial must be without real roots, got roots {roots}.")
    return np.column_stack([-2 * upper.real, np.abs(upper) ** 2])


@functools.cache
def inverse_root_table() -> Table:
    """Returns the polynomials for spectra of condition numbers up to `LARGEST_CONDITION`."""
    octaves = np.log2(LARGEST_CONDITION / _SMALLEST_CONDITION)
    conditions = np.geomspace(_SMALLEST_CONDITION, LARGEST_CONDITION, round(octaves * _ROWS_PER_OCTAVE) + 1)
    rows, errors = [], []
    for condition in conditions:
        low, high = 1 / float(condition), 1.0
        row = []
        for degree in DEGREES:
            coefficients, error = inverse_root_polynomial(low, high, degree)
            low, high = (1 - error) ** 2, (1 + error) ** 2
            row.append(coefficients)
        rows.append(row)
        errors.append(error)
    polynomials = list(zip(*rows, strict=True))
    leads = tuple(np.array([coefficients[-1] for coefficients in column]) for column in polynomials)
    quadratics = tuple(np.stack([*map(quadratic_factors, column)]) for column in polynomials)
    return Table(conditions, leads, quadratics, np.asarray(errors))

"""K (a·I + E)^(−1/2) from nine matrix products, for symmetric positive semidefinite E: no inverse, no decomposition.

The matrix is divided by a bound on its spectrum and goes through those polynomials q of `minimax` that fit its
condition number: t ← t·q(t)² brings all eigenvalues to one, and the product of all q(t) is the inverse root.

Every matrix on the way is a multiple of the identity, held in the accumulation dtype, plus a remainder, and products
take the remainders in K's dtype. So where E vanishes, which it does but for the few directions of one mini-batch, the
result has the accumulation dtype's accuracy even with K in half precision.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax.minimax import LARGEST_CONDITION, inverse_root_table
from rootfree_optax.precision import upcast
from rootfree_optax.products import matmul

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
    relative error of the inverse root is 3e-5 at κ = 30, 2e-3 at 100 and 8e-2 at 1024, or what the dtypes resolve: in
    bfloat16 about 1e-2 at 30. Where κ may be above 1024, E is shrunk as a whole until it is not.

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
    row = jnp.searchsorted(jnp.asarray(table.conditions[:-1], a.dtype), top / a, method="compare_all")
    first, second, last = (jnp.asarray(coefficients, a.dtype)[row] for coefficients in table.coefficients)

    t, k = Shifted(a / top, scale * unit), upcast(factor)
    q = _linear(first, t)
    k = _times(k, q, multiply)
    t = _times_square(t, q, multiply, tq=jnp.square(scale) * first[..., 1] * square)
    q = _linear(second, t)
    k = _times(k, q, multiply)
    t = _times_square(t, q, multiply, tq=multiply(t.matrix, q.matrix))
    return _times(k, _quartic(last, t, multiply), multiply) * jax.lax.rsqrt(top)


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


def _times_square(t: Shifted, q: Shifted, multiply: Product, *, tq: jax.Array) -> Shifted:
    """Returns t·q², given the product `tq` of the remainders of t and q, which commute."""
    scalar = t.scalar * q.scalar
    matrix = t.scalar * q.matrix + q.scalar * t.matrix + tq
    return Shifted(scalar * q.scalar, scalar * q.matrix + _times(matrix, q, multiply))


def _linear(coefficients: jax.Array, t: Shifted) -> Shifted:
    """Returns c₀ + c₁·t."""
    c0, c1 = coefficients[..., 0], coefficients[..., 1]
    return Shifted(c0 + c1 * t.scalar, c1 * t.matrix)


def _quartic(coefficients: jax.Array, t: Shifted, multiply: Product) -> Shifted:
    """Returns Σⱼ cⱼ·tʲ for j up to four, by two products: as a polynomial of t's remainder, bₖ = Σⱼ C(j, k)·cⱼ·sʲ⁻ᵏ."""
    c = [coefficients[..., j] for j in range(5)]
    b = [
        sum((math.comb(j, k) * c[j] * t.scalar ** (j - k) for j in range(k, 5)), start=jnp.zeros_like(t.scalar))
        for k in range(5)
    ]
    square = multiply(t.matrix, t.matrix)
    high = multiply(square, b[3] * t.matrix + b[4] * square)
    return Shifted(b[0], b[1] * t.matrix + b[2] * square + high)

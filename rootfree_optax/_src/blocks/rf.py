"""The mathematics of root-free Shampoo with inverses, for ONE block: no trees, no flags, no schedules.

A factor S is symmetric positive definite: a matrix [d, d], or a vector [d] that holds a diagonal one. L below is its
lower Cholesky factor, elementwise the square root for a diagonal, and every inverse is a triangular solve with L.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.finite import all_finite
from rootfree_optax._src.structures import Parts, Structure


def _one_at_a_time(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a function of matrices that works through a batch of them by a loop on CPUs, and elsewhere as it is.

    Batched factorizations and solves each take a thread of a CPU's pool and wait for others of it to work on the batch:
    as many at once as there are threads wait for ever. One matrix after another asks for no other thread.
    """
    alone = jax.custom_batching.sequential_vmap(function)

    @jax.custom_jvp
    def whole(*arrays: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(*arrays, cpu=alone, default=function)

    @whole.defjvp
    def with_tangent(arrays: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        return whole(*arrays), jax.jvp(function, arrays, tangents)[1]  # the loop's own could not be transposed

    return whole


_cholesky = _one_at_a_time(jnp.linalg.cholesky)
_solve = {
    transposed: _one_at_a_time(functools.partial(solve_triangular, lower=True, trans=int(transposed)))
    for transposed in (False, True)
}


def cholesky(s: jax.Array) -> jax.Array:
    """Returns L with L Lᵀ = S."""
    return jnp.sqrt(s) if s.ndim == 1 else _cholesky(s)


def solve(lower: jax.Array, tensor: jax.Array, axis: int, *, transposed: bool = False) -> jax.Array:
    """Returns `tensor` multiplied along `axis` by L⁻¹, or by L⁻ᵀ."""
    unfolded = jnp.moveaxis(tensor, axis, 0)
    if lower.ndim == 1:
        solution = unfolded / lower.reshape(-1, *(1,) * (tensor.ndim - 1))
    else:
        solution = _solve[transposed](lower, unfolded.reshape(lower.shape[0], -1))
    return jnp.moveaxis(solution.reshape(unfolded.shape), 0, axis)


def inverse_trace(lower: jax.Array) -> jax.Array:
    """Returns Tr(S⁻¹) = ‖L⁻¹‖²_F."""
    if lower.ndim == 1:
        return jnp.sum(1 / jnp.square(lower))
    return jnp.sum(jnp.square(solve(lower, jnp.eye(lower.shape[0], dtype=lower.dtype), 0)))


def curvature_along(
    gradient: jax.Array, n: int, lowers: Sequence[jax.Array], *, damping: ArrayLike, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """Returns Hₙ = ( G₍ₙ₎ (⊗_{j≠n} Sⱼ⁻¹) G₍ₙ₎ᵀ + λ·Π_{j≠n} Tr(Sⱼ⁻¹)·I ) / Π_{j≠n} dⱼ, of Sₙ's shape.

    Args:
      gradient: √B·G, [d₁, …, d_N] or [samples, d₁, …, d_N], already divided by the root of the number of samples.
      n: the axis, from zero, samples not counted.
      lowers: L of each S.
      damping: λ ≥ 0.
      precision: of the product.
    """
    first_axis = gradient.ndim - len(lowers)
    others = [j for j in range(len(lowers)) if j != n]
    whitened = gradient
    for j in others:
        whitened = solve(lowers[j], whitened, first_axis + j)
    unfolded = jnp.moveaxis(whitened, first_axis + n, 0).reshape(lowers[n].shape[0], -1)
    isotropic = jnp.asarray(damping, gradient.dtype) * math.prod(inverse_trace(lowers[j]) for j in others)
    other_dims = math.prod(lowers[j].shape[0] for j in others)
    if lowers[n].ndim == 1:
        return (jnp.sum(jnp.square(unfolded), axis=1) + isotropic) / other_dims
    outer = jnp.einsum("ia,ja->ij", unfolded, unfolded, precision=precision)
    return (outer + isotropic * jnp.eye(len(outer), dtype=outer.dtype)) / other_dims


def refresh(
    gradient: jax.Array,
    factors: tuple[Parts, ...],
    *,
    structures: Sequence[Structure],
    preconditioner_lr: ArrayLike,
    damping: ArrayLike,
    batch_size: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[tuple[Parts, ...]]:
    """Refreshes a block's factors, Sₙ ← (1 − β₂) Sₙ + β₂ Hₙ, all from the old ones, if they have Cholesky factors.

    Args:
      gradient: G, [d₁, …, d_N] or [samples, d₁, …, d_N].
      factors: the parts of each Sₙ, in float32 or float64.
      structures: the structure of each factor, dense or diagonal.
      preconditioner_lr: β₂, in [0, 1].
      damping: λ ≥ 0.
      batch_size: B > 0.
      precision: of the products.

    Returns:
      The new factors, as the one entry of a tuple.
    """
    matrices = [part for (part,) in factors]
    dtype = matrices[0].dtype
    samples = math.prod(gradient.shape[: gradient.ndim - len(structures)])
    scaled = upcast(gradient).astype(dtype) * jnp.sqrt(jnp.asarray(batch_size, dtype) / samples)
    lowers = [cholesky(s) for s in matrices]
    new = tuple(
        (
            jnp.asarray(1 - preconditioner_lr, dtype) * s
            + jnp.asarray(preconditioner_lr, dtype)
            * curvature_along(scaled, n, lowers, damping=damping, precision=precision),
        )
        for n, s in enumerate(matrices)
    )
    # An S that rounding has made indefinite, as after a gradient a million times as large, has no Cholesky factor and
    # would make every later direction NaN.
    keep = all_finite((new, [cholesky(s) for (s,) in new]))
    return (jax.tree.map(functools.partial(jnp.where, keep), new, factors),)


def precondition(gradient: jax.Array, factors: tuple[Parts, ...], *, structures: Sequence[Structure]) -> jax.Array:
    """Returns G multiplied along every axis n by Sₙ⁻¹, or G itself if it is not finite, in the factors' dtype."""
    del structures
    whole = direction = gradient.astype(factors[0][0].dtype)
    for axis, (s,) in enumerate(factors):
        lower = cholesky(s)
        direction = solve(lower, solve(lower, direction, axis), axis, transposed=True)
    return jnp.where(all_finite(gradient), direction, whole)

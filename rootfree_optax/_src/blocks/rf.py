"""Root-free Shampoo with inverses, for ONE block: no trees, no schedules.

A factor S is symmetric positive definite: a matrix [d, d], or a vector [d] that holds a diagonal one. L below is its
lower Cholesky factor, elementwise the square root for a diagonal, and every inverse is a triangular solve with L.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.rule import BlockFlops, BlockRule, Factors, Step, Structures
from rootfree_optax._src.numerics.arithmetic import accumulation_dtype, all_finite, upcast
from rootfree_optax._src.structures.base import Structure


def _one_at_a_time(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a function of matrices that works through a batch of them by a loop on CPUs, and elsewhere as it is.

    A batched factorization or solve takes one thread of a CPU's pool and waits for others. If as many run at once as
    there are threads, they wait for ever. One matrix at a time needs no other thread.
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


def curvatures_along(
    gradient: jax.Array, lowers: Sequence[jax.Array], *, damping: ArrayLike, precision: jax.lax.PrecisionLike
) -> list[jax.Array]:
    """Returns Hₙ = ( G₍ₙ₎ (⊗_{j≠n} Sⱼ⁻¹) G₍ₙ₎ᵀ + λ·Π_{j≠n} Tr(Sⱼ⁻¹)·I ) / Π_{j≠n} dⱼ for each axis n, of Sₙ's shape.

    Args:
      gradient: √B·G, [d₁, …, d_N] or [samples, d₁, …, d_N], already divided by the root of the number of samples.
      lowers: L of each S.
      damping: λ ≥ 0.
      precision: of the product.
    """
    first_axis = gradient.ndim - len(lowers)
    traces = [inverse_trace(lower) for lower in lowers]
    curvatures = []
    for n, lower in enumerate(lowers):
        others = [j for j in range(len(lowers)) if j != n]
        whitened = gradient
        for j in others:
            whitened = solve(lowers[j], whitened, first_axis + j)
        unfolded = jnp.moveaxis(whitened, first_axis + n, 0).reshape(len(lower), -1)
        isotropic = jnp.asarray(damping, gradient.dtype) * math.prod(traces[j] for j in others)
        if lower.ndim == 1:
            outer = jnp.sum(jnp.square(unfolded), axis=1)
        else:
            outer = jnp.einsum("ia,ja->ij", unfolded, unfolded, precision=precision)
            isotropic *= jnp.eye(len(outer), dtype=outer.dtype)
        curvatures.append((outer + isotropic) / math.prod(len(lowers[j]) for j in others))
    return curvatures


class RfState(NamedTuple):
    """What a block keeps of its curvature.

    Attributes:
      factors: the parts of each Sₙ.
      refused: how many refreshes were refused, because they had no Cholesky factor.
    """

    factors: Factors
    refused: jax.Array


@dataclasses.dataclass(frozen=True)
class CholeskyInverse(BlockRule):
    """RF-Shampoo: averages curvatures, and solves with their Cholesky factors.

        Sₙ ← (1 − β₂) Sₙ + β₂ Hₙ,   direction = G ×₁ S₁⁻¹ … ×_N S_N⁻¹

    with the Hₙ of `curvatures_along`, all from the old factors, in float32 or float64.

    Args:
      precision: of the products, see `jax.lax.Precision`.
    """

    precision: jax.lax.PrecisionLike = None

    def init(self, structures: Structures, dtypes: Sequence[jnp.dtype]) -> RfState:
        """Returns factors at I, in at least single precision."""
        factors = (s.identity(accumulation_dtype(dtype)) for s, dtype in zip(structures, dtypes, strict=True))
        return RfState(tuple(factors), jnp.zeros([], jnp.int32))

    def refresh(self, state: RfState, gradient: jax.Array, *, structures: Structures, step: Step) -> RfState:
        """Refreshes the factors, if the new ones have Cholesky factors."""
        with jax.named_scope("refresh"):
            matrices = [part for (part,) in state.factors]
            dtype = matrices[0].dtype
            samples = math.prod(gradient.shape[: gradient.ndim - len(structures)])
            scaled = upcast(gradient).astype(dtype) * jnp.sqrt(jnp.asarray(step.batch_size, dtype) / samples)
            lowers = [cholesky(s) for s in matrices]
            curvatures = curvatures_along(scaled, lowers, damping=step.damping, precision=self.precision)
            keep, take_in = jnp.asarray(1 - step.weight, dtype), jnp.asarray(step.weight, dtype)
            new = tuple([(keep * s + take_in * h,) for s, h in zip(matrices, curvatures, strict=True)])
            # An S that rounding has made indefinite, as after a gradient a million times as large, has no Cholesky
            # factor and would make every later direction NaN.
            is_definite = all_finite((new, [cholesky(s) for (s,) in new]))
            factors = jax.tree.map(lambda n, old: jnp.where(is_definite, n, old), new, state.factors)
        return RfState(factors, state.refused + (~is_definite).astype(state.refused.dtype))

    def precondition(
        self, state: RfState, momentum: jax.Array, *, gradient: jax.Array, structures: Structures, step: Step
    ) -> tuple[jax.Array, RfState]:
        """Returns M multiplied along every axis n by Sₙ⁻¹, or M itself if it is not finite, in the factors' dtype."""
        del gradient, structures, step
        with jax.named_scope("apply"):
            whole = direction = momentum.astype(state.factors[0][0].dtype)
            for axis, (s,) in enumerate(state.factors):
                lower = cholesky(s)
                direction = solve(lower, solve(lower, direction, axis), axis, transposed=True)
            return jnp.where(all_finite(momentum), direction, whole), state

    def flops(self, structures: Structures) -> BlockFlops:
        """Returns the operations of products, triangular solves, and the Cholesky factors of d³/3 each."""
        size = math.prod([s.dim for s in structures])
        rows = [1 if s.is_diagonal else s.dim for s in structures]  # that one row is multiplied by
        solves = [size * r for r in rows]
        choleskys = sum([s.dim * r * r // 3 for s, r in zip(structures, rows, strict=True)])
        # For each axis: the other axes' solves, the outer product, Tr(S⁻¹), and S's Cholesky factor before and after.
        whitening = (len(structures) - 1) * sum(solves)
        traces = sum([s.dim * r * r for s, r in zip(structures, rows, strict=True)]) if len(structures) > 1 else 0
        refresh = whitening + sum([2 * size * r for r in rows]) + traces + 2 * choleskys
        return BlockFlops(observe=0, refresh=refresh, precondition=2 * sum(solves) + choleskys)

    def supports(self, structure: Structure) -> str | None:
        """Returns why a structure has no inverse within it, unless it is dense or diagonal."""
        if structure.is_dense or structure.is_diagonal:
            return None
        return "rf_shampoo needs structures that hold their inverses, dense or diagonal. Use sirf_shampoo for others."

"""The mathematics of ONE factor of inverse-free root-free Shampoo: its step, and two ways to take it.

Everything is made of matrix products: no inverse, root, solve or decomposition. Factors may be in half precision.
Products take them as they are and accumulate in float32. What is stored is rounded so that its error averages to zero,
because β₂ times a step is often below half precision's resolution.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.folding import fold, fold_axes, unfold_means
from rootfree_optax._src.numerics.dtypes import accumulation_dtype, is_low_precision, upcast
from rootfree_optax._src.numerics.rounding import round_dithered
from rootfree_optax._src.structures.base import Parts, Structure


def times_scalar(parts: Parts, factor: ArrayLike) -> Parts:
    """Returns the parts times a scalar."""
    return jax.tree.map(lambda part: part * jnp.asarray(factor, part.dtype), parts)


def outer_products(
    gradient: jax.Array,
    structures: Sequence[Structure],
    factors: Sequence[Parts],
    *,
    batch_size: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Parts, ...]:
    """Returns what a gradient says of each axis's curvature as the factors see it: I on average where they are right.

        outerₙ = Π̂( X₍ₙ₎X₍ₙ₎ᵀ ) / Π_{j≠n} dⱼ,   X = √B·G ×₁ K₁ᵀ … ×_N K_Nᵀ

    Args:
      gradient: G, [d₁, …, d_N], or [samples, d₁, …, d_N] for a mean over samples of X₍ₙ₎X₍ₙ₎ᵀ.
      structures: the structure of each factor.
      factors: the parts of each factor.
      batch_size: B > 0.
      precision: of every product.

    Returns:
      The parts for each axis, in the accumulation dtype.
    """
    samples = math.prod(gradient.shape[: gradient.ndim - len(structures)])
    scaled, divisors = _scaled(structures, factors)
    groups, folded_structures, matrices = fold(structures, scaled)
    x = fold_axes(upcast(gradient), len(structures), folded_structures)
    x = x * jnp.sqrt(jnp.asarray(batch_size, x.dtype) / samples)
    first_axis = x.ndim - len(folded_structures)
    for axis, (structure, parts) in enumerate(zip(folded_structures, matrices, strict=True), start=first_axis):
        x = structure.apply_transposed(parts, x, axis, precision=precision)
    outers = []
    for axis, (structure, parts) in enumerate(zip(folded_structures, matrices, strict=True), start=first_axis):
        outer = structure.project_outer(x.astype(parts[0].dtype), axis, precision=precision)
        outers.append(times_scalar(outer, structure.dim / math.prod(divisors)))
    return unfold_means(groups, structures, outers)


def factor_steps(
    outers: Sequence[Parts],
    structures: Sequence[Structure],
    factors: Sequence[Parts],
    *,
    damping: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Parts, ...]:
    """Returns each factor's step, which vanishes where KₙᵀHₙKₙ = I, all from the old factors.

        stepₙ = ( outerₙ + λ·Π̂( Π_{j≠n} Tr(KⱼᵀKⱼ)/dⱼ · KₙᵀKₙ ) − I ) / 2

    Args:
      outers: the parts for each axis, see `outer_products`, of one gradient or a mean over some.
      structures: the structure of each factor.
      factors: the parts of each factor.
      damping: λ ≥ 0.
      precision: of every product.

    Returns:
      The parts of each step, in the accumulation dtype.
    """
    scaled, divisors = _scaled(structures, factors)
    mean_traces = [
        s.squared_norm(parts) / divisor for s, parts, divisor in zip(structures, scaled, divisors, strict=True)
    ]
    steps = []
    for n, (outer, structure, parts, divisor) in enumerate(zip(outers, structures, scaled, divisors, strict=True)):
        dtype = accumulation_dtype(parts[0].dtype)
        inner = structure.project_inner(parts, precision=precision)
        other_traces = math.prod((t for j, t in enumerate(mean_traces) if j != n), start=jnp.ones((), dtype))
        weight = jnp.asarray(damping, dtype) * other_traces.astype(dtype) * (structure.dim / divisor)
        steps.append(
            tuple(
                0.5 * (o.astype(dtype) + weight * i - identity)
                for o, i, identity in zip(outer, inner, structure.identity(dtype), strict=True)
            )
        )
    return tuple(steps)


def _scaled(structures: Sequence[Structure], factors: Sequence[Parts]) -> tuple[list[Parts], list[int]]:
    """Returns the parts that products take for each K, and what the square of these is still to be divided by.

    A K in half precision enters divided by √d, so that neither X nor KᵀK leaves its range on long axes. Elsewhere that
    would be one more pass over the factor.
    """
    pairs = [
        (times_scalar(parts, 1 / math.sqrt(structure.dim)), 1)
        if is_low_precision(parts[0].dtype)
        else (parts, structure.dim)
        for structure, parts in zip(structures, factors, strict=True)
    ]
    return [parts for parts, _ in pairs], [divisor for _, divisor in pairs]


def published_factor(
    structure: Structure,
    factor: Parts,
    step: Parts,
    *,
    preconditioner_lr: ArrayLike,
    count: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> Parts:
    """Returns K ← K − β₂ / max(1, ‖m‖_F) · K m, the clipped first-order truncation of K Expm(−β₂ m).

    Args:
      structure: the factor's structure.
      factor: the parts of K.
      step: the parts of m, of K's dtype or wider.
      preconditioner_lr: β₂ ≥ 0.
      count: the step's number, for the dithered rounding of a half-precision factor.
      precision: of the product.
    """
    # ‖m‖ from smaller entries where their squares overflow. Both sums take one pass, dividing by the largest entry two.
    unit = 2.0 ** (-5 * jnp.finfo(step[0].dtype).maxexp // 8)
    square, in_units = structure.squared_norm(step), structure.squared_norm(times_scalar(step, unit))
    scale = jnp.where(jnp.isfinite(square), 1, jnp.asarray(unit, square.dtype))
    norm = jnp.sqrt(jnp.where(jnp.isfinite(square), square, in_units))  # of m times the scale
    clipped = times_scalar(times_scalar(step, scale), 1 / jnp.maximum(scale, norm))
    rounded = jax.tree.map(lambda m, k: m.astype(k.dtype), clipped, factor)
    change = structure.matmul(factor, rounded, precision=precision)
    return jax.tree.map(
        lambda k, c: round_dithered(upcast(k) - jnp.asarray(preconditioner_lr, c.dtype) * c, k.dtype, count),
        factor,
        change,
    )


def exact_factor(
    structure: Structure,
    factor: Parts,
    step: Parts,
    *,
    preconditioner_lr: ArrayLike,
    count: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> Parts:
    """Returns K ← K (I + 2β₂·step)^(−1/2), with which S = (K Kᵀ)⁻¹ becomes (1 − β₂)·S + β₂·H.

    Where that is not in the structure, the root is what comes nearest to it, see `Structure.times_inverse_root`: of the
    whole M = I + 2β₂·step, not of its projection, K C has the least Tr(CᵀMC) − 2 log|det C|.

    The step is at least −I/2, whatever the gradient, so that the root is one of a matrix that is at least 1 − β₂.

    Args:
      structure: the factor's structure, one that has an inverse root.
      factor: the parts of K.
      step: the parts of the step, in the accumulation dtype.
      preconditioner_lr: β₂, in [0, 1).
      count: the step's number, for the dithered rounding of a half-precision factor.
      precision: of every product.
    """
    dtype = step[0].dtype
    lr = jnp.asarray(preconditioner_lr, dtype)
    excess = jax.tree.map(lambda s, i: lr * (2 * s + i), step, structure.identity(dtype))
    shift = jnp.asarray(1 - preconditioner_lr, dtype)
    new = structure.times_inverse_root(factor, excess, shift=shift, precision=precision)
    return jax.tree.map(lambda n, k: round_dithered(n, k.dtype, count), new, factor)

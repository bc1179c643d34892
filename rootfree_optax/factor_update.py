"""The mathematics of inverse-free root-free Shampoo, for ONE block: no trees, no flags, no schedules.

A block is a tensor G with axes 1…N of lengths d₁…d_N. Each axis has a factor K of some structure, with
K Kᵀ ≈ S⁻¹, where S is RF-Shampoo's curvature estimate along that axis, and a momentum m of the same structure.
Everything is made of matrix products: no inverse, root, solve or decomposition.

Factors may be in half precision. Products take them as they are and accumulate in float32. What is stored is rounded
so that its error averages to zero, because β₂ times a step is often below half precision's resolution.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax.precision import accumulation_dtype, exponent_of, power_of_two, round_dithered, upcast
from rootfree_optax.structures.base import Parts, Structure


def _scale(parts: Parts, factor: ArrayLike) -> Parts:
    return jax.tree.map(lambda part: part * jnp.asarray(factor, part.dtype), parts)


def _max_abs(parts: Parts) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(part)) for part in parts])


def _saturate(array: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `array` in the dtype of `like`, entries beyond its range at the range's end."""
    limit = jnp.asarray(jnp.finfo(like.dtype).max, array.dtype)
    return jnp.clip(array, -limit, limit).astype(like.dtype)


def all_finite(tree: object) -> jax.Array:
    """Returns whether every entry of every array is finite, a scalar."""
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])


def factor_steps(
    gradient: jax.Array,
    structures: Sequence[Structure],
    factors: Sequence[Parts],
    *,
    damping: ArrayLike,
    batch_size: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Parts, ...]:
    """Returns each factor's step, which vanishes where KₙᵀHₙKₙ = I, all from the old factors.

        stepₙ = Π̂( X₍ₙ₎X₍ₙ₎ᵀ + λ·Π_{j≠n} Tr(KⱼᵀKⱼ)·KₙᵀKₙ ) / (2 Π_{j≠n} dⱼ) − I/2,   X = √B·G ×₁ K₁ᵀ … ×_N K_Nᵀ

    Each K enters divided by √d, so that neither X nor KᵀK leaves half precision's range on long axes.

    Args:
      gradient: G, [d₁, …, d_N], or [samples, d₁, …, d_N] for a mean over samples of X₍ₙ₎X₍ₙ₎ᵀ.
      structures: the structure of each factor.
      factors: the parts of each factor.
      damping: λ ≥ 0.
      batch_size: B > 0.
      precision: of every product.

    Returns:
      The parts of each step, in the accumulation dtype.
    """
    dims = [structure.dim for structure in structures]
    first_axis = gradient.ndim - len(dims)
    samples = math.prod(gradient.shape[:first_axis])
    scaled = [_scale(parts, 1 / math.sqrt(dim)) for parts, dim in zip(factors, dims, strict=True)]
    x = upcast(gradient)
    x = x * jnp.sqrt(jnp.asarray(batch_size, x.dtype) / samples)
    for axis, (structure, parts) in enumerate(zip(structures, scaled, strict=True), start=first_axis):
        x = structure.apply_transposed(parts, x, axis, precision=precision)
    mean_traces = [s.squared_norm(parts) / s.dim for s, parts in zip(structures, scaled, strict=True)]
    steps = []
    for n, (structure, parts) in enumerate(zip(structures, scaled, strict=True)):
        dtype = accumulation_dtype(parts[0].dtype)
        outer = structure.project_outer(x.astype(parts[0].dtype), first_axis + n, precision=precision)
        inner = structure.project_inner(parts, precision=precision)
        other_traces = math.prod((t for j, t in enumerate(mean_traces) if j != n), start=jnp.ones((), dtype))
        inner_weight = 0.5 * jnp.asarray(damping, dtype) * other_traces.astype(dtype) * float(math.prod(dims))
        steps.append(
            tuple(
                0.5 * dims[n] * o + inner_weight * i - 0.5 * identity
                for o, i, identity in zip(outer, inner, structure.identity(dtype), strict=True)
            )
        )
    return tuple(steps)


def refresh_factor(
    structure: Structure,
    factor: Parts,
    momentum: Parts,
    *,
    preconditioner_lr: ArrayLike,
    count: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> Parts:
    """Returns K ← K − β₂ / max(1, ‖m‖_F) · K m, the clipped first-order truncation of K Expm(−β₂ m).

    Args:
      structure: the factor's structure.
      factor: the parts of K.
      momentum: the parts of m, of K's dtype or wider.
      preconditioner_lr: β₂ ≥ 0.
      count: the step's number, for the dithered rounding of a half-precision factor.
      precision: of the product.
    """
    # ‖m‖ from the entries divided by the largest, because their squares may overflow where they do not.
    largest = jnp.maximum(1, _max_abs(momentum))
    unit = _scale(momentum, 1 / largest)
    clipped = _scale(unit, 1 / jnp.maximum(1 / largest, jnp.sqrt(structure.squared_norm(unit))))
    rounded = jax.tree.map(lambda m, k: m.astype(k.dtype), clipped, factor)
    change = structure.matmul(factor, rounded, precision=precision)
    return jax.tree.map(
        lambda k, c: round_dithered(upcast(k) - jnp.asarray(preconditioner_lr, c.dtype) * c, k.dtype, count),
        factor,
        change,
    )


def balance(factors: tuple[Parts, ...]) -> tuple[Parts, ...]:
    """Returns the factors brought within 2¹⁶ of each other, by exact powers of two whose product is one.

    c·K₁ and K₂ / c precondition alike and have equal steps, so nothing in the refresh holds c: in tens of thousands of
    refreshes it would drift until one factor overflows.
    """
    exponents = [exponent_of(_max_abs(parts)) for parts in factors]
    shifts = [jnp.sign(e - exponents[0]) * (jnp.abs(e - exponents[0]) // 16) * 8 for e in exponents]
    return tuple(
        _scale(parts, power_of_two(shift))
        for parts, shift in zip(
            factors, [sum(shifts[1:], start=shifts[0]), *(-shift for shift in shifts[1:])], strict=True
        )
    )


def refresh(
    gradient: jax.Array,
    factors: tuple[Parts, ...],
    momenta: tuple[Parts, ...],
    *,
    structures: Sequence[Structure],
    preconditioner_lr: ArrayLike,
    damping: ArrayLike,
    riemannian_momentum: ArrayLike,
    batch_size: ArrayLike,
    count: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[tuple[Parts, ...], tuple[Parts, ...]]:
    """Refreshes a block's factors and their momenta; a block that would come out non-finite stays as it was.

        mₙ ← α₂ mₙ + (1 − α₂) stepₙ        Kₙ ← Kₙ − β₂ / max(1, ‖mₙ‖_F) · Kₙ mₙ

    Args:
      gradient: G, [d₁, …, d_N] or [samples, d₁, …, d_N].
      factors: the parts of each Kₙ.
      momenta: the parts of each mₙ, or empty: then mₙ = stepₙ and none is kept.
      structures: the structure of each factor.
      preconditioner_lr: β₂ ≥ 0.
      damping: λ ≥ 0.
      riemannian_momentum: α₂, in [0, 1).
      batch_size: B > 0.
      count: the step's number.
      precision: of every product.

    Returns:
      The new factors and momenta, of the dtypes of the old.
    """
    directions = factor_steps(
        gradient, structures, factors, damping=damping, batch_size=batch_size, precision=precision
    )
    if momenta:
        directions = jax.tree.map(
            lambda m, step: (
                jnp.asarray(riemannian_momentum, step.dtype) * m.astype(step.dtype)
                + jnp.asarray(1 - riemannian_momentum, step.dtype) * step
            ),
            momenta,
            directions,
        )
    new_factors = balance(
        tuple(
            refresh_factor(s, k, m, preconditioner_lr=preconditioner_lr, count=count, precision=precision)
            for s, k, m in zip(structures, factors, directions, strict=True)
        )
    )
    new_momenta = jax.tree.map(_saturate, directions, momenta) if momenta else ()
    keep = all_finite((new_factors, new_momenta))
    select = functools.partial(jax.tree.map, lambda new, old: jnp.where(keep, new, old))
    return select(new_factors, factors), select(new_momenta, momenta)


def precondition(
    gradient: jax.Array,
    factors: tuple[Parts, ...],
    *,
    structures: Sequence[Structure],
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns G multiplied along every axis n by KₙKₙᵀ.

    Each K enters divided by a power of two near its largest entry, and so do G and the products on the way where K's
    dtype has a narrower range than theirs (float16); the result is scaled back. So no intermediate leaves half
    precision's range before the result itself does.

    Args:
      gradient: G, [d₁, …, d_N].
      factors: the parts of each Kₙ.
      structures: the structure of each factor.
      precision: of every product.

    Returns:
      The direction, [d₁, …, d_N], in the accumulation dtype.
    """
    direction = upcast(gradient)
    rescale = jnp.ones((), direction.dtype)
    for axis, (structure, parts) in enumerate(zip(structures, factors, strict=True)):
        scale = power_of_two(exponent_of(_max_abs(parts))).astype(rescale.dtype)
        scaled = _scale(parts, 1 / scale)
        if jnp.finfo(parts[0].dtype).maxexp < jnp.finfo(direction.dtype).maxexp:
            unit = power_of_two(exponent_of(jnp.max(jnp.abs(direction)))).astype(rescale.dtype)
            direction, rescale = direction / unit, rescale * unit
        direction = structure.apply_transposed(scaled, direction, axis, precision=precision)
        direction = structure.apply(scaled, direction, axis, precision=precision)
        rescale = rescale * jnp.square(scale)
    return direction * rescale

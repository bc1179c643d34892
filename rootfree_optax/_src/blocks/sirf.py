"""Inverse-free root-free Shampoo, for ONE block: no trees, no schedules.

A block is a tensor G with axes 1…N of lengths d₁…d_N. Each axis has a factor K of some structure, with K Kᵀ ≈ S⁻¹,
where S is RF-Shampoo's curvature estimate along that axis. Everything is made of matrix products: no inverse, root,
solve or decomposition. Factors may be in half precision. Products take them as they are and accumulate in float32. What
is stored is rounded so that its error averages to zero, because β₂ times a step is often below half precision's
resolution.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.apply import apply_factors, apply_transposes, fold, fold_axes, unfold_means
from rootfree_optax._src.blocks.rule import BlockFlops, BlockRule, Factors, Step
from rootfree_optax._src.common.validate import kind_of
from rootfree_optax._src.numerics.arithmetic import (
    accumulation_dtype,
    exponent_of,
    is_low_precision,
    max_abs,
    power_of_two,
    round_dithered,
    saturate,
    upcast,
)
from rootfree_optax._src.structures.base import Parts, Structure, times_scalar


class SirfState(NamedTuple):
    """What a block keeps of its curvature; None for what is off.

    Attributes:
      factors: the parts of each Kₙ.
      momenta: the parts of each factor's Riemannian momentum mₙ.
      preconditioners: the parts of each KₙKₙᵀ.
      refused: how many refreshes were refused, because they came out non-finite.
    """

    factors: Factors
    momenta: Factors | None
    preconditioners: Factors | None
    refused: jax.Array


def outer_products(
    gradient: jax.Array,
    structures: Sequence[Structure],
    factors: Factors,
    *,
    batch_size: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> Factors:
    """Returns a gradient's curvature along each axis in the factors' coordinates: I on average where they are right.

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
    scaled, divisors = _scale_low_precision(structures, factors)
    groups, folded_structures, matrices = fold(structures, scaled)
    x = fold_axes(upcast(gradient), len(structures), folded_structures)
    x = x * jnp.sqrt(jnp.asarray(batch_size, x.dtype) / samples)
    x = apply_transposes(x, matrices, structures=folded_structures, precision=precision)
    first_axis = x.ndim - len(folded_structures)
    outers = []
    for axis, (structure, parts) in enumerate(zip(folded_structures, matrices, strict=True), start=first_axis):
        outer = structure.project_outer(x.astype(parts[0].dtype), axis, precision=precision)
        outers.append(times_scalar(outer, structure.dim / math.prod(divisors)))
    return unfold_means(groups, structures, outers)


def factor_steps(
    outers: Factors,
    structures: Sequence[Structure],
    factors: Factors,
    *,
    damping: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> Factors:
    """Returns each factor's step, which vanishes where KₙᵀHₙKₙ = I, all from the old factors.

        stepₙ = ( outerₙ + λ·Π̂( Π_{j≠n} Tr(KⱼᵀKⱼ)/dⱼ · KₙᵀKₙ ) − I ) / 2

    Args:
      outers: the parts for each axis, see `outer_products`.
      structures: the structure of each factor.
      factors: the parts of each factor.
      damping: λ ≥ 0.
      precision: of every product.

    Returns:
      The parts of each step, in the accumulation dtype.
    """
    scaled, divisors = _scale_low_precision(structures, factors)
    mean_traces = [s.squared_norm(k) / divisor for s, k, divisor in zip(structures, scaled, divisors, strict=True)]
    steps = []
    for n, (outer, structure, parts, divisor) in enumerate(zip(outers, structures, scaled, divisors, strict=True)):
        dtype = accumulation_dtype(parts[0].dtype)
        inner = structure.project_inner(parts, precision=precision)
        other_traces = math.prod([t for j, t in enumerate(mean_traces) if j != n], start=jnp.ones((), dtype))
        weight = jnp.asarray(damping, dtype) * other_traces.astype(dtype) * (structure.dim / divisor)
        steps.append(
            tuple(
                [
                    0.5 * (o.astype(dtype) + weight * i - identity)
                    for o, i, identity in zip(outer, inner, structure.identity(dtype), strict=True)
                ]
            )
        )
    return tuple(steps)


def _scale_low_precision(structures: Sequence[Structure], factors: Factors) -> tuple[list[Parts], list[int]]:
    """Returns the parts that products take for each K, and what the square of these is still to be divided by.

    A K in half precision enters divided by √d, so that neither X nor KᵀK leaves its range on long axes. Elsewhere that
    would be one more pass over the factor.
    """
    low = [is_low_precision(parts[0].dtype) for parts in factors]
    scaled = [
        times_scalar(k, 1 / math.sqrt(s.dim)) if is_low else k
        for s, k, is_low in zip(structures, factors, low, strict=True)
    ]
    return scaled, [1 if is_low else s.dim for s, is_low in zip(structures, low, strict=True)]


def take_clipped_step(
    structure: Structure,
    factor: Parts,
    step: Parts,
    *,
    weight: ArrayLike,
    count: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> Parts:
    """Returns K ← K − β₂ / max(1, ‖m‖_F) · K m, the clipped first-order truncation of K Expm(−β₂ m).

    Args:
      structure: the factor's structure.
      factor: the parts of K.
      step: the parts of m, of K's dtype or wider.
      weight: β₂ ≥ 0.
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
        lambda k, c: round_dithered(upcast(k) - jnp.asarray(weight, c.dtype) * c, k.dtype, count), factor, change
    )


def balance(factors: Factors, sizes: Sequence[jax.Array]) -> Factors:
    """Returns factors of one size, where they were more than 2¹⁶ apart, by exact powers of two whose product is one.

    c·K₁ and K₂ / c precondition alike and have equal steps, so nothing in the refresh holds c: in tens of thousands of
    refreshes it would drift until one factor overflows.

    Args:
      factors: the parts of each.
      sizes: the largest absolute value of each, see `max_abs`.
    """
    if len(factors) == 1:
        return factors
    exponents = [exponent_of(size) for size in sizes]
    largest, smallest = functools.reduce(jnp.maximum, exponents), functools.reduce(jnp.minimum, exponents)
    mean = sum(exponents[1:], start=exponents[0]) // len(factors)
    is_apart = largest - smallest > 16
    shifts = [jnp.where(is_apart, mean - exponent, 0) for exponent in exponents[1:]]
    first = -sum(shifts[1:], start=shifts[0])  # which takes what the division left over
    return tuple([times_scalar(k, power_of_two(shift)) for k, shift in zip(factors, [first, *shifts], strict=True)])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["riemannian_momentum", "initial_scale"],
    meta_fields=["cache_preconditioner", "precision"],
)
@dataclasses.dataclass(frozen=True)
class PublishedRefresh(BlockRule):
    """Refreshes factors by the paper's clipped first-order step.

        mₙ ← α₂ mₙ + (1 − α₂) stepₙ,   Kₙ ← Kₙ − β₂ / max(1, ‖mₙ‖_F) · Kₙ mₙ

    Relative to K a step is at most β₂, so that wide layers, long intervals and sudden large gradients need many
    refreshes.

    Args:
      riemannian_momentum: α₂, in [0, 1). None keeps no momentum: mₙ = stepₙ.
      initial_scale: s > 0, the curvature before the first step: the factors of N axes start at s^(−1/2N)·I.
      cache_preconditioner: whether K Kᵀ is kept, as large as K, which halves the products of a step without refresh.
      precision: of every matrix product, see `jax.lax.Precision`.
    """

    riemannian_momentum: ArrayLike | None = None
    initial_scale: ArrayLike = 1.0
    cache_preconditioner: bool = False
    precision: jax.lax.PrecisionLike = None

    def init(self, structures: Sequence[Structure], dtypes: Sequence[jnp.dtype]) -> SirfState:
        """Returns factors at s^(−1/2N)·I, and a momentum of zero if there is one."""
        identities = tuple(s.identity(dtype) for s, dtype in zip(structures, dtypes, strict=True))
        factors = tuple(times_scalar(k, self.initial_scale ** (-0.5 / len(structures))) for k in identities)
        zeros = tuple(s.zeros(dtype) for s, dtype in zip(structures, dtypes, strict=True))
        square = lambda part: saturate(jnp.square(upcast(part)), part.dtype)  # K Kᵀ of a multiple of I
        return SirfState(
            factors,
            momenta=None if self.riemannian_momentum is None else zeros,
            preconditioners=jax.tree.map(square, factors) if self.cache_preconditioner else None,
            refused=jnp.zeros([], jnp.int32),
        )

    def refresh(
        self, state: SirfState, gradient: jax.Array, *, structures: Sequence[Structure], step: Step
    ) -> SirfState:
        """Refreshes the factors and their momenta; a block that would come out non-finite stays as it was."""
        with jax.named_scope("refresh"):
            outers = outer_products(
                gradient, structures, state.factors, batch_size=step.batch_size, precision=self.precision
            )
            directions = factor_steps(outers, structures, state.factors, damping=step.damping, precision=self.precision)
            if state.momenta is not None:
                alpha: Any = self.riemannian_momentum
                average = lambda m, new: (
                    jnp.asarray(alpha, new.dtype) * m.astype(new.dtype) + jnp.asarray(1 - alpha, new.dtype) * new
                )
                directions = jax.tree.map(average, state.momenta, directions)
            take = functools.partial(take_clipped_step, weight=step.weight, count=step.count, precision=self.precision)
            refreshed = tuple([take(s, k, m) for s, k, m in zip(structures, state.factors, directions, strict=True)])
            # Each pass over the factors counts beside their products. These numbers tell what a test of every entry
            # would, of the momenta, too: one that is not finite makes its factor non-finite.
            sizes = [max_abs(parts) for parts in refreshed]
            keep = functools.reduce(jnp.logical_and, map(jnp.isfinite, sizes))
            select = lambda new, old: jax.tree.map(lambda n, o: jnp.where(keep, saturate(n, o.dtype), o), new, old)
            factors = select(balance(refreshed, sizes), state.factors)
            if state.momenta is not None:
                state = state._replace(momenta=select(directions, state.momenta))
            if state.preconditioners is not None:
                squares = [s.square(k, precision=self.precision) for s, k in zip(structures, factors, strict=True)]
                stored = jax.tree.map(lambda new, old: saturate(new, old.dtype), tuple(squares), state.preconditioners)
                state = state._replace(preconditioners=stored)
            return state._replace(factors=factors, refused=state.refused + (~keep).astype(state.refused.dtype))

    def precondition(
        self,
        state: SirfState,
        momentum: jax.Array,
        *,
        gradient: jax.Array,
        structures: Sequence[Structure],
        step: Step,
    ) -> tuple[jax.Array, SirfState]:
        """Returns D = M ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ."""
        del gradient, step
        with jax.named_scope("apply"):
            squares = state.preconditioners
            direction = apply_factors(
                momentum,
                state.factors if squares is None else squares,
                structures=structures,
                transposed_first=squares is None,
                precision=self.precision,
            )
        return direction, state

    def flops(self, structures: Sequence[Structure]) -> BlockFlops:
        """Returns the operations of the products; each axis counts by itself, although short ones are folded."""
        size = math.prod([structure.dim for structure in structures])
        axes = [structure.flops(columns=size // structure.dim) for structure in structures]
        applied = sum([axis.apply for axis in axes])
        curvature = applied + sum([axis.project_outer + axis.project_inner for axis in axes])
        products = sum([axis.matmul for axis in axes])  # K m along every axis, or K Kᵀ
        return BlockFlops(
            observe=0,
            refresh=curvature + (1 + self.cache_preconditioner) * products,
            precondition=applied if self.cache_preconditioner else 2 * applied,
        )

    def options(self) -> Mapping[str, Any]:
        """Returns which arrays are kept."""
        kept = kind_of(self.riemannian_momentum)
        return {"riemannian_momentum": kept, "cache_preconditioner": self.cache_preconditioner}

    def supports(self, structure: Structure) -> str | None:
        """Returns why K Kᵀ cannot be kept, where it is to be and the structure is not closed under transposition."""
        if self.cache_preconditioner and not structure.is_symmetric:
            return (
                "cache_preconditioner=True needs structures that are closed under transposition (dense, diagonal, "
                "block-diagonal). Use cache_preconditioner=False for others."
            )
        return None

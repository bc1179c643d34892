"""Inverse-free root-free Shampoo, for ONE block: no trees, no schedules.

A block is a tensor G with axes 1…N of lengths d₁…d_N. Each axis has a factor K of some structure, with K Kᵀ ≈ S⁻¹,
where S is RF-Shampoo's curvature estimate along that axis. Everything is made of matrix products: no inverse, root,
solve or decomposition. Factors may be in half precision. Products take them as they are and accumulate in float32. What
is stored is rounded so that its error averages to zero, because β₂ times a step is often below half precision's
resolution.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.apply import apply_factors, clip_to_trust_radius, fold, fold_axes, unfold_means
from rootfree_optax._src.blocks.rule import BlockFlops, BlockRule, Step
from rootfree_optax._src.common.validate import require_positive
from rootfree_optax._src.numerics.dtypes import accumulation_dtype, is_low_precision, upcast
from rootfree_optax._src.numerics.finite import max_abs
from rootfree_optax._src.numerics.rounding import exponent_of, power_of_two, round_dithered, saturate, within_range
from rootfree_optax._src.structures.base import Parts, Structure, times_scalar

Factors: TypeAlias = tuple[Parts, ...]
Kept: TypeAlias = Any  # None where it is off


class SirfState(NamedTuple):
    """What a block keeps of its curvature; None for what is off.

    Attributes:
      factors: the parts of each Kₙ.
      momenta: the parts of each factor's Riemannian momentum mₙ.
      preconditioners: the parts of each KₙKₙᵀ.
      statistics: the parts of the sum of each axis's outer products since the last refresh.
      observed: how many gradients `statistics` adds up.
      is_calibrated: whether the factors have been scaled to the block's first gradient.
      refused: how many refreshes were refused, because they came out non-finite.
      shortened: how many directions were longer than the trust radius.
    """

    factors: Factors
    momenta: Kept
    preconditioners: Kept
    statistics: Kept
    observed: Kept
    is_calibrated: Kept
    refused: jax.Array
    shortened: Kept


def scale_factors(factors: Factors, scale: ArrayLike) -> Factors:
    """Returns the factors times a scalar, within their dtype's range."""

    def scaled(part: jax.Array) -> jax.Array:
        wide = upcast(part)
        return saturate(wide * jnp.asarray(scale, wide.dtype), part.dtype)

    return jax.tree.map(scaled, factors)


def estimate_first_root(gradient: jax.Array, *, damping: ArrayLike, batch_size: ArrayLike) -> jax.Array:
    """Returns √(B·mean(g²) + λ), the mean over the entries of G that are not zero. A scalar.

    The rows of an embedding that a mini-batch does not touch tell nothing of the curvature of those that it does.

    Args:
      gradient: G, any shape, finite, and not all zero.
      damping: λ ≥ 0.
      batch_size: B > 0.
    """
    g = jnp.abs(upcast(gradient))
    largest = jnp.max(g)
    unit = g / jnp.where(largest > 0, largest, 1)  # its squares do not overflow
    mean_square = jnp.sum(jnp.square(unit)) / jnp.maximum(jnp.sum(unit > 0, dtype=g.dtype), 1)
    root_of = lambda number: jnp.sqrt(jnp.asarray(number, g.dtype))
    return jnp.hypot(largest * root_of(jnp.asarray(batch_size, g.dtype) * mean_square), root_of(damping))


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
    first_axis = x.ndim - len(folded_structures)
    for axis, (structure, parts) in enumerate(zip(folded_structures, matrices, strict=True), start=first_axis):
        x = structure.apply_transposed(parts, x, axis, precision=precision)
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
      outers: the parts for each axis, see `outer_products`, of one gradient or a mean over some.
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


def take_exact_step(
    structure: Structure,
    factor: Parts,
    step: Parts,
    *,
    weight: ArrayLike,
    count: jax.Array,
    precision: jax.lax.PrecisionLike = None,
) -> Parts:
    """Returns K ← K (I + 2β₂·step)^(−1/2), with which S = (K Kᵀ)⁻¹ becomes (1 − β₂)·S + β₂·H.

    Where that is not in the structure, the root is the nearest one in it, see `Structure.times_inverse_root`: of the
    whole M = I + 2β₂·step, not of its projection, K C has the least Tr(CᵀMC) − 2 log|det C|.

    The step is at least −I/2 for every gradient, so that the root is one of a matrix that is at least 1 − β₂.

    Args:
      structure: the factor's structure, one that has an inverse root.
      factor: the parts of K.
      step: the parts of the step, in the accumulation dtype.
      weight: β₂, in [0, 1).
      count: the step's number, for the dithered rounding of a half-precision factor.
      precision: of every product.
    """
    dtype = step[0].dtype
    lr = jnp.asarray(weight, dtype)
    excess = jax.tree.map(lambda s, i: lr * (2 * s + i), step, structure.identity(dtype))
    shift = jnp.asarray(1 - weight, dtype)
    new = structure.times_inverse_root(factor, excess, shift=shift, precision=precision)
    return jax.tree.map(lambda n, k: round_dithered(n, k.dtype, count), new, factor)


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


class InverseFreeRule(BlockRule):
    """What the two inverse-free refreshes share: factors K with K Kᵀ ≈ S⁻¹, applied by products.

    A block with a non-finite gradient, or whose factors would come out non-finite, keeps its factors.
    """

    cache_preconditioner: bool
    precision: jax.lax.PrecisionLike

    def _init(
        self, structures: Sequence[Structure], dtypes: Sequence[jnp.dtype], *, curvature: ArrayLike, **kept: bool
    ) -> SirfState:
        """Returns factors for a curvature of s·I, and zeros for what else is kept."""
        identities = tuple(s.identity(dtype) for s, dtype in zip(structures, dtypes, strict=True))
        factors = tuple(times_scalar(k, curvature ** (-0.5 / len(structures))) for k in identities)
        zeros = tuple(s.zeros(dtype) for s, dtype in zip(structures, dtypes, strict=True))
        number = jnp.zeros([], jnp.int32)
        return SirfState(
            factors,
            momenta=zeros if kept.get("momenta") else None,
            preconditioners=jax.tree.map(_square, factors) if self.cache_preconditioner else None,
            statistics=zeros if kept.get("statistics") else None,
            observed=number if kept.get("statistics") else None,
            is_calibrated=jnp.zeros([], bool) if kept.get("calibrates") else None,
            refused=number,
            shortened=number if kept.get("shortened") else None,
        )

    @abc.abstractmethod
    def take_step(
        self, structure: Structure, factor: Parts, direction: Parts, *, weight: ArrayLike, count: jax.Array
    ) -> Parts:
        """Returns the factor after a step along a direction."""

    def _refresh(
        self,
        state: SirfState,
        directions: Factors,
        *,
        structures: Sequence[Structure],
        step: Step,
        has_evidence: Sequence[jax.Array] = (),
    ) -> SirfState:
        """Returns the state after every factor took a step, if the block has evidence and all factors stay finite."""
        refreshed = tuple(
            [
                self.take_step(s, k, m, weight=step.weight, count=step.count)
                for s, k, m in zip(structures, state.factors, directions, strict=True)
            ]
        )
        # Each pass over the factors counts beside their products. These numbers tell what a test of every entry would,
        # of the momenta, too: one that is not finite makes its factor non-finite.
        sizes = [max_abs(parts) for parts in refreshed]
        is_finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, sizes))
        keep = functools.reduce(jnp.logical_and, has_evidence, is_finite)
        is_refused = functools.reduce(jnp.logical_and, has_evidence, ~is_finite)
        select = lambda new, old: jax.tree.map(lambda n, o: jnp.where(keep, saturate(n, o.dtype), o), new, old)
        factors = select(balance(refreshed, sizes), state.factors)
        if state.momenta is not None:
            state = state._replace(momenta=select(directions, state.momenta))
        if state.preconditioners is not None:
            squares = tuple([s.square(k, precision=self.precision) for s, k in zip(structures, factors, strict=True)])
            stored = jax.tree.map(lambda new, old: saturate(new, old.dtype), squares, state.preconditioners)
            state = state._replace(preconditioners=stored)
        return state._replace(factors=factors, refused=state.refused + is_refused.astype(state.refused.dtype))

    def apply(self, state: SirfState, tensor: jax.Array, *, structures: Sequence[Structure]) -> jax.Array:
        """Returns D = tensor ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ."""
        with jax.named_scope("apply"):
            if state.preconditioners is None:
                matrices, transposed_first = state.factors, True
            else:
                matrices, transposed_first = state.preconditioners, False
            return apply_factors(
                tensor, matrices, structures=structures, transposed_first=transposed_first, precision=self.precision
            )

    def _flops(self, structures: Sequence[Structure], *, products: int, observes: bool) -> BlockFlops:
        """Returns the operations if a refresh takes `products` products of a factor beside those of its curvature.

        Each axis counts by itself, although short ones are multiplied along as one.
        """
        size = math.prod([structure.dim for structure in structures])
        axes = [structure.flops(columns=size // structure.dim) for structure in structures]
        curvature = sum([axis.apply + axis.project_outer for axis in axes])
        refresh = sum([axis.project_inner + (products + self.cache_preconditioner) * axis.matmul for axis in axes])
        apply = sum([axis.apply for axis in axes])
        return BlockFlops(
            observe=curvature if observes else 0,
            refresh=refresh if observes else refresh + curvature,
            precondition=apply if self.cache_preconditioner else 2 * apply,
        )

    def supports(self, structure: Structure) -> str | None:
        """Returns why K Kᵀ cannot be kept, where it is to be and the structure is not closed under transposition."""
        if self.cache_preconditioner and not structure.is_symmetric:
            return (
                "cache_preconditioner=True needs structures that are closed under transposition (dense, diagonal, "
                "block-diagonal). Use cache_preconditioner=False for others."
            )
        return None


def _square(part: jax.Array) -> jax.Array:
    return saturate(jnp.square(upcast(part)), part.dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trust_radius"],
    meta_fields=["observes", "cache_preconditioner", "precision"],
)
@dataclasses.dataclass(frozen=True)
class ExactRefresh(InverseFreeRule):
    """Refreshes factors by RF-Shampoo's average of curvatures itself, whatever the width.

        Kₙ ← Kₙ (I + 2β₂·stepₙ)^(−1/2),   so that Sₙ = (KₙKₙᵀ)⁻¹ becomes (1 − β₂)·Sₙ + β₂·Hₙ

    with the step of `factor_steps`, and an inverse root made of eight products (see `times_inverse_root`). It shrinks a
    dense K by at most 32 times: a larger gradient takes further refreshes. Factors start at the scale of the block's
    first gradient, Kₙ = (B·mean(g²) + λ)^(−1/2N)·I.

    Args:
      trust_radius: r > 0, how long a direction may be, see `clip_to_trust_radius`. None shortens nothing.
      observes: whether a refresh takes the mean curvature of all gradients that `observe` has seen since the last one,
        rather than that of its own gradient.
      cache_preconditioner: whether K Kᵀ is kept, as large as K, which halves the products of a step without refresh.
      precision: of every matrix product, see `jax.lax.Precision`.
    """

    trust_radius: ArrayLike | None = None
    observes: bool = False
    cache_preconditioner: bool = False
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self) -> None:
        """Checks the trust radius."""
        require_positive("trust_radius", self.trust_radius)

    def init(self, structures: Sequence[Structure], dtypes: Sequence[jnp.dtype]) -> SirfState:
        """Returns factors at I, until the first gradient."""
        return self._init(
            structures,
            dtypes,
            curvature=1.0,
            statistics=self.observes,
            calibrates=True,
            shortened=self.trust_radius is not None,
        )

    def waits(self, state: SirfState) -> jax.Array:
        """Returns whether the factors have not been scaled to a gradient yet."""
        return jnp.logical_not(state.is_calibrated)

    def start(self, state: SirfState, gradient: jax.Array, *, structures: Sequence[Structure], step: Step) -> SirfState:
        """Scales the factors to the block's first gradient: Kₙ ← (B·mean(g²) + λ)^(−1/2N)·Kₙ."""
        root = estimate_first_root(gradient, damping=step.damping, batch_size=step.batch_size)
        scale = root ** (-1 / len(structures))
        return state._replace(
            factors=scale_factors(state.factors, scale),
            preconditioners=scale_factors(state.preconditioners, jnp.square(scale)),
            is_calibrated=jnp.ones_like(state.is_calibrated),
        )

    def observe(
        self, state: SirfState, gradient: jax.Array, *, structures: Sequence[Structure], step: Step
    ) -> SirfState:
        """Adds a gradient's outer products to the sums since the last refresh; a non-finite gradient is left out."""
        with jax.named_scope("statistics"):
            outers = outer_products(
                gradient, structures, state.factors, batch_size=step.batch_size, precision=self.precision
            )
            keep = functools.reduce(jnp.logical_and, [jnp.isfinite(max_abs(parts)) for parts in outers])

            def add(total: jax.Array, outer: jax.Array) -> jax.Array:
                wide = within_range(upcast(total) + outer, total.dtype)
                # Rounded to nearest, a long sum would stop growing in half precision.
                return jnp.where(keep, round_dithered(wide, total.dtype, state.observed), total)

            statistics = jax.tree.map(add, state.statistics, outers)
        return state._replace(statistics=statistics, observed=state.observed + keep.astype(jnp.int32))

    def refresh(
        self, state: SirfState, gradient: jax.Array, *, structures: Sequence[Structure], step: Step
    ) -> SirfState:
        """Refreshes the factors; a block without evidence, or that would come out non-finite, stays as it was.

        Refreshed without any curvature, factors would grow until damping alone limits them.
        """
        with jax.named_scope("refresh"):
            evidence = [state.is_calibrated]
            if state.statistics is None:
                outers = outer_products(
                    gradient, structures, state.factors, batch_size=step.batch_size, precision=self.precision
                )
            else:
                evidence.append(state.observed > 0)
                outers = jax.tree.map(
                    lambda total: upcast(total) / jnp.maximum(state.observed, 1).astype(upcast(total).dtype),
                    state.statistics,
                )
            steps = factor_steps(outers, structures, state.factors, damping=step.damping, precision=self.precision)
            new = self._refresh(state, steps, structures=structures, step=step, has_evidence=evidence)
            return new._replace(
                statistics=jax.tree.map(jnp.zeros_like, state.statistics),
                observed=jax.tree.map(jnp.zeros_like, state.observed),
            )

    def take_step(
        self, structure: Structure, factor: Parts, direction: Parts, *, weight: ArrayLike, count: jax.Array
    ) -> Parts:
        """Returns K (I + 2β₂·step)^(−1/2)."""
        return take_exact_step(structure, factor, direction, weight=weight, count=count, precision=self.precision)

    def precondition(
        self,
        state: SirfState,
        momentum: jax.Array,
        *,
        gradient: jax.Array,
        structures: Sequence[Structure],
        step: Step,
    ) -> tuple[jax.Array, SirfState]:
        """Returns D = M ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ, within the trust radius."""
        direction = self.apply(state, momentum, structures=structures)
        if self.trust_radius is None:
            return direction, state
        direction, is_long = clip_to_trust_radius(
            direction, momentum, trust_radius=self.trust_radius, batch_size=step.batch_size
        )
        return direction, state._replace(shortened=state.shortened + is_long.astype(jnp.int32))

    def flops(self, structures: Sequence[Structure]) -> BlockFlops:
        """Returns the operations: the inverse root of a dense factor takes eight products, and counts so for others."""
        return self._flops(structures, products=8, observes=self.observes)

    def supports(self, structure: Structure) -> str | None:
        """Returns why the refresh has no closed form for a structure, if it has none."""
        if not structure.has_inverse_root:
            return (
                "the exact refresh needs structures whose refresh has a closed form (dense, diagonal, block-diagonal, "
                "hierarchical, triltopleftdiag, triubottomrightdiag). Use rf.published.sirf_shampoo for others."
            )
        return super().supports(structure)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["riemannian_momentum", "initial_scale"],
    meta_fields=["cache_preconditioner", "precision"],
)
@dataclasses.dataclass(frozen=True)
class PublishedRefresh(InverseFreeRule):
    """Refreshes factors by the paper's clipped first-order step.

        mₙ ← α₂ mₙ + (1 − α₂) stepₙ,   Kₙ ← Kₙ − β₂ / max(1, ‖mₙ‖_F) · Kₙ mₙ

    Relative to K a step is at most β₂, so that wide layers, long intervals and sudden large gradients need many
    refreshes.

    Args:
      riemannian_momentum: α₂, in [0, 1). None keeps no momentum: mₙ = stepₙ.
      initial_scale: s > 0, the curvature before the first step: the factors of N axes start at s^(−1/2N)·I.
      cache_preconditioner: whether K Kᵀ is kept, see `ExactRefresh`.
      precision: of every matrix product, see `jax.lax.Precision`.
    """

    riemannian_momentum: ArrayLike | None = None
    initial_scale: ArrayLike = 1.0
    cache_preconditioner: bool = False
    precision: jax.lax.PrecisionLike = None

    def init(self, structures: Sequence[Structure], dtypes: Sequence[jnp.dtype]) -> SirfState:
        """Returns factors at s^(−1/2N)·I, and a momentum of zero if there is one."""
        return self._init(
            structures, dtypes, curvature=self.initial_scale, momenta=self.riemannian_momentum is not None
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
            return self._refresh(state, directions, structures=structures, step=step)

    def take_step(
        self, structure: Structure, factor: Parts, direction: Parts, *, weight: ArrayLike, count: jax.Array
    ) -> Parts:
        """Returns K − β₂ / max(1, ‖m‖_F) · K m."""
        return take_clipped_step(structure, factor, direction, weight=weight, count=count, precision=self.precision)

    def flops(self, structures: Sequence[Structure]) -> BlockFlops:
        """Returns the operations: a step takes one product, K m."""
        return self._flops(structures, products=1, observes=False)

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
        return self.apply(state, momentum, structures=structures), state

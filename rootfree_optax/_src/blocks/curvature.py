"""Scale-free Kronecker preconditioning of ONE block: what is kept of its curvature, and three steps from it.

A block is a tensor G with axes 1…N of lengths d₁…d_N. Along each axis

    Sₙ ← b₂ Sₙ + (1 − b₂) Hₙ,   Hₙ = G₍ₙ₎ (⊗_{j≠n} S̃ⱼ⁻¹) G₍ₙ₎ᵀ / Π_{j≠n} dⱼ          statistics, of every gradient
    S̃ₙ = Sₙ + (ρ·tr(Sₙ)/dₙ)·I,   KₙKₙᵀ = S̃ₙ⁻¹                                        refresh, by products alone
    Sₙ ← Sₙ / gₙ^(1 − 1/max(Nu, 1)),   gₙ = tr(KₙᵀS̃ₙKₙ)/dₙ with the Kₙ before          where a part u of Sₙ is new

These are the Kronecker factors that are nearest to the gradients' covariance by the Kullback–Leibler divergence. The
steps along a momentum M differ by the power of S̃, and by whether the momentum is orthogonalized in between:

    root-free    D = M ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ                  SIRF-Shampoo
    whitening    D = M ×₁ S̃₁^(−1/2) … ×_N S̃_N^(−1/2)            KL-Shampoo
    spectral     D = msign(M ×ₙ S̃ₙ^(−q)) ×ₙ S̃ₙ^(−q)             FISMO at q = 1/2, Mousse at q = 1/8, Muon at q = 0

Nothing depends on the gradients' scale: they are divided by a power of two near their size before anything else.
"""

import abc
import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.apply import (
    apply_factors,
    apply_other_transposes,
    apply_transposes,
    count_other_transposes,
    fold,
    fold_axes,
    fold_structures,
    group_axes,
    unfold_means,
)
from rootfree_optax._src.blocks.rule import NO_SCALE, BlockFlops, BlockRule, Factors, Step, Structures
from rootfree_optax._src.common.schedules import StepSize
from rootfree_optax._src.numerics.arithmetic import (
    accumulation_dtype,
    exponent_of,
    has_smaller_range,
    is_low_precision,
    max_abs,
    measure_entries,
    power_of_two,
    round_dithered,
    upcast,
)
from rootfree_optax._src.numerics.inverse_root import LARGEST_CONDITION
from rootfree_optax._src.numerics.polar import orthogonalize
from rootfree_optax._src.structures.base import Parts, Structure, times_scalar

# A gradient that is this many times larger or smaller than the average, as a power of two, changes the scale.
_LARGEST_SURPRISE = 2
# An average of gradients that is longer than this beside them, in rms, is of gradients that are gone.
_LARGEST_MOMENTUM = 2
# Where mean(x²), S and its growth between two refreshes, and the momentum end, so that their squares are numbers.
_LARGEST_POWER = 2.0**60
# How far mean(x²) may be from one, as a power of two, so that float16 holds x between two refreshes.
_LARGEST_DRIFT = 16
# Of a direction's mean size, the most that its root mean square may be before the direction counts as sparse. One entry
# alone then moves by one learning rate in noise, as with AdamW, and by this many at most. In the first 150 steps of a
# decoder and 60 of a convolutional network all directions were below 2.3; numbers of a Gaussian are at 1.25.
_DENSE = 2.5
# Of its root mean square, the most that a direction's largest entry may be: one among many that are small, but not
# zero, then moves by ten learning rates in noise. In such runs, and in 40 steps of a decoder of 3 million, all were
# below 23, those of the spectral step below 10.
_LARGEST_ENTRY = 25.0
# A block whose gradients are below this part of the whole tree's is rounding noise.
_LEAST_PART = 1e-6
# Products of square matrices: KᵀS̃K, and K times an inverse root.
_REFRESH_PRODUCTS = 10
_SYMMETRIC_ROOT_PRODUCTS, _POSITIVE_ROOT_PRODUCTS = 22, 8
# How many square roots of S̃^(−1/2) make S̃^(−q).
_ROOTS = {1 / 4: 1, 1 / 8: 2}
# Between two refreshes S may lose all that it was. K grows at most as if a part of this size were left.
_LEAST_RETAINED = 2.0**-5
# Of S's Frobenius norm, the least damping that factors in half precision need: K resolves 2⁻⁸, and S⁻¹ is its square.
_LOW_PRECISION_FLOOR = 2.0**-14
# Dense axes that are not longer are refreshed together.
_SHORTEST = 16


class CurvatureState(NamedTuple):
    """What a block keeps of its curvature; None for what is off.

    Attributes:
      statistics: the parts of each Sₙ, of gradients divided by 2ᵉ, in the accumulation dtype.
      factors: the parts of each Kₙ.
      preconditioners: the parts of each S̃ₙ^(−q), where it is neither Kₙ nor made of it at every step.
      exponent: e, an integer: the gradients are divided by 2ᵉ.
      power: the average of mean(G²)/4ᵉ.
      seen: how many gradients S averages, the first one twice. Zero before the first.
      retained: which part of the S of the last refresh is still in S.
      last_momentum: the root mean square of the momentum, divided by 2ᵉ, at the last step with a gradient.
      refused: how many refreshes were refused, because they came out non-finite.
      shortened: how many steps were shortened.
      agreement: the moving average of the cosine between a gradient and the momentum before it.
    """

    statistics: Factors
    factors: Factors
    preconditioners: Factors | None
    exponent: jax.Array
    power: jax.Array
    seen: jax.Array
    retained: jax.Array
    last_momentum: jax.Array
    refused: jax.Array
    shortened: jax.Array
    agreement: jax.Array


class Scaled(NamedTuple):
    """A gradient in units in which a block's gradients are near one.

    Attributes:
      gradient: x = G / 2ᵉ; zero where G is no evidence.
      exponent: e, an int32.
      power: mean(x²).
      is_evidence: whether G is finite and not all zero.
    """

    gradient: jax.Array
    exponent: jax.Array
    power: jax.Array
    is_evidence: jax.Array


def scale_by_exponent(array: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns array·2ᵉ, exactly, for −126 ≤ e ≤ 126; an e outside counts as the nearer end."""
    return array * power_of_two(jnp.clip(exponent, -126, 126)).astype(array.dtype)


def scale_gradient(
    gradient: jax.Array, exponent: jax.Array, power: jax.Array, *, largest_rise: jax.Array | float, largest_fall: float
) -> Scaled:
    """Returns a gradient divided by 2ᵉ, where e follows gradients that are far from the average.

    Without that, a moving average would remember gradients of another size for many times its memory: a gradient a
    thousand times as large counts a million times as much.

    Args:
      gradient: G, any shape.
      exponent: e so far, an int32.
      power: the average of mean(x²) so far, positive.
      largest_rise: by how many powers of two the root of mean(x²) may be above the average's.
      largest_fall: by how many it may be below.
    """
    g = upcast(gradient)
    largest = jnp.max(jnp.abs(g))
    top = exponent_of(largest)
    unit = scale_by_exponent(g, -top)  # its squares neither overflow nor vanish
    mean_square = jnp.mean(jnp.square(unit))
    is_evidence = (mean_square > 0) & jnp.isfinite(largest)
    mean_square = jnp.where(is_evidence, mean_square, 1)
    surprise = (top - exponent).astype(g.dtype) + 0.5 * (jnp.log2(mean_square) - jnp.log2(power.astype(g.dtype)))
    excess = jnp.round(surprise - jnp.clip(surprise, -largest_fall, largest_rise)).astype(exponent.dtype)
    new_exponent = jnp.where(is_evidence, exponent + excess, exponent)
    shift = jnp.clip(top - new_exponent, -60, 60)
    return Scaled(
        jnp.where(is_evidence, scale_by_exponent(unit, shift), 0),
        new_exponent,
        scale_by_exponent(mean_square, 2 * shift),
        is_evidence,
    )


def curvatures_along(
    gradient: jax.Array, structures: Structures, factors: Factors, *, precision: jax.lax.PrecisionLike = None
) -> Factors:
    """Returns Hₙ = Π̂( Z₍ₙ₎Z₍ₙ₎ᵀ ) / Π_{j≠n} dⱼ with Z = G ×_{j≠n} Kⱼᵀ, for each axis n.

    Args:
      gradient: G, [d₁, …, d_N], or [samples, d₁, …, d_N] for a mean over samples.
      structures: the structure of each axis.
      factors: the parts of each Kₙ.
      precision: of every product.

    Returns:
      The parts for each axis, in the accumulation dtype.
    """
    groups, folded, matrices = fold(structures, factors)
    tensor = fold_axes(gradient, len(structures), folded)
    products = apply_other_transposes(tensor, matrices, structures=folded, precision=precision)
    outers = []
    for axis, (z, structure, parts) in enumerate(zip(products, folded, matrices, strict=True)):
        # Rounded to what multiplies fast; but float16 may not hold Z, whose products are in float32 anyway.
        narrow = parts[0].dtype
        z = z if has_smaller_range(narrow, z.dtype) else z.astype(narrow)
        outer = structure.project_outer(z, tensor.ndim - len(folded) + axis, precision=precision)
        outers.append(times_scalar(outer, structure.dim / gradient.size))
    return unfold_means(groups, structures, outers, factors, precision=precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvatureRule(BlockRule):
    """What the three steps share: statistics, the refresh of K, and the step's length.

    Silence is not evidence: a gradient that is all zero, or not finite, leaves the curvature as it was.

    With `step_size="adamw"` a step has the length of AdamW's, so that its learning rate serves: D is scaled to a root
    mean square of `rms` in noise, and of up to one while gradients agree with the momentum before them. Their
    average cosine is the slope of the loss in the length of the step (hypergradient descent, arXiv 1703.04782): above a
    half it gives the full length, in noise `rms`. A step is shorter, as AdamW's is, where the momentum is of the past:
    in proportion to it while a block's gradients are zero, and in inverse proportion where it is larger than they are
    by far, after they have fallen. So silence does not move a block by more than rms/(1 − momentum). It is shorter,
    too, where few entries of a block move, so that they move about as far as with AdamW, or one far more than the
    others, and where a block's gradients are rounding noise beside the tree's. With "newton" it is D itself for the
    curvature B·S, no longer than the trust radius.

    Args:
      step_size: "adamw" or "newton".
      trust_radius: r > 0, for Newton's root-free or whitening step. None shortens nothing.
      precision: of every matrix product, see `jax.lax.Precision`.
    """

    step_size: StepSize = "adamw"
    trust_radius: ArrayLike | None = None
    precision: jax.lax.PrecisionLike = None
    rms: ClassVar[float] = 0.4  # of a step in noise, beside the learning rate; the ladder chose it
    applications: ClassVar[int] = 2  # how often a matrix is applied along each axis, for one direction

    @property
    def root_products(self) -> int:
        """How many products of square matrices `derive_factor` takes for each axis."""
        return 0

    @property
    @abc.abstractmethod
    def degrees(self) -> tuple[float, float]:
        """The powers of the momentum and of the inverse curvature that D is made of."""

    def squared_length(self, momentum: jax.Array, direction: jax.Array) -> jax.Array:
        """Returns mean((M ×ₙ Kₙᵀ)²), a scalar, from M and its direction."""
        raise TypeError(f"{type(self).__name__} bounds its steps itself, and takes no trust_radius.")

    def scale(self, state: CurvatureState) -> jax.Array:
        """Returns the base-2 logarithm of the rms of the block's gradients; `NO_SCALE` before the first."""
        log = state.exponent.astype(jnp.float32) + 0.5 * jnp.log2(state.power)
        return jnp.where(state.seen > 0, log, NO_SCALE)

    @abc.abstractmethod
    def precondition_momentum(self, state: CurvatureState, momentum: jax.Array, structures: Structures) -> jax.Array:
        """Returns D, of any length, in the accumulation dtype."""

    def derive_factor(self, factor: Parts, damped: Parts, structure: Structure) -> tuple[Parts, Parts | None]:
        """Returns the factor to keep, of equal K Kᵀ, and the preconditioner that is made of it; None for none.

        Args:
          factor: the parts of K.
          damped: the parts of S̃ = (K Kᵀ)⁻¹.
          structure: of both.
        """
        del damped, structure
        return factor, None

    def init(self, structures: Structures, dtypes: Sequence[jnp.dtype]) -> CurvatureState:
        """Returns statistics and factors of I, until the first gradient."""
        wide = tuple(s.identity(accumulation_dtype(dtype)) for s, dtype in zip(structures, dtypes, strict=True))
        narrow = tuple(s.identity(dtype) for s, dtype in zip(structures, dtypes, strict=True))
        zero, one, number = jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32), jnp.zeros([], jnp.int32)
        _, derived = jax.eval_shape(lambda: self.derive_factor(narrow[0], wide[0], structures[0]))
        return CurvatureState(
            statistics=wide,
            factors=narrow,
            preconditioners=None if derived is None else narrow,
            exponent=number,
            power=one,
            seen=zero,
            retained=one,
            last_momentum=zero,
            refused=number,
            shortened=number,
            agreement=zero,
        )

    def waits(self, state: CurvatureState) -> jax.Array:
        """Returns whether there was no gradient yet."""
        if not (jnp.issubdtype(state.exponent.dtype, jnp.integer) and state.seen.dtype == jnp.float32):
            raise TypeError(
                "a state must have the dtypes of tx.init(params), integers for `exponent` and float32 for `seen`, got "
                f"{state.exponent.dtype} and {state.seen.dtype}. Cast what an average or a conversion has changed back."
            )
        return state.seen == 0

    def start(
        self, state: CurvatureState, gradient: jax.Array, *, structures: Structures, step: Step
    ) -> CurvatureState:
        """Sets every Sₙ to the multiple of I that the block's first gradient suggests.

        The rows of an embedding that a mini-batch does not touch tell nothing of the curvature of those that it does,
        so that only entries count that are not zero.
        """
        scaled = scale_gradient(gradient, state.exponent, state.power, largest_rise=0.5, largest_fall=0.5)
        touched = jnp.mean((gradient != 0).astype(scaled.power.dtype))
        mean = (scaled.power / touched) ** (1 / len(structures))
        damped = (1 + jnp.asarray(step.damping, mean.dtype)) * mean
        multiples = lambda number, like: tuple(
            [times_scalar(s.identity(old[0].dtype), number) for s, old in zip(structures, like, strict=True)]
        )
        derived = state.preconditioners
        return state._replace(
            statistics=multiples(mean, state.statistics),
            factors=multiples(damped**-0.5, state.factors),
            preconditioners=derived and multiples(damped ** -self.degrees[1], derived),
            exponent=scaled.exponent,
            power=scaled.power.astype(state.power.dtype),
            seen=jnp.ones_like(state.seen),
        )

    def observe(
        self, state: CurvatureState, gradient: jax.Array, *, structures: Structures, step: Step
    ) -> CurvatureState:
        """Averages the curvature of a gradient into S; all gradients weigh alike until there are 1/(1 − b₂) of them.

        Rows of a diagonal axis that the gradient does not touch keep their curvature.
        """
        with jax.named_scope("statistics"):
            # Newton's step is the momentum divided by the curvature. If one tiny gradient made that tiny, too, the step
            # would be far too long. AdamW's length is short then, until the momentum has fallen. And one gradient alone
            # does not tell that the next, beside it, is a surprise.
            is_newton = self.step_size == "newton"
            largest_fall = math.inf if is_newton else _LARGEST_SURPRISE
            largest_rise = jnp.where(state.seen > 2, _LARGEST_SURPRISE, 0.5) if is_newton else _LARGEST_SURPRISE
            scaled = scale_gradient(
                gradient, state.exponent, state.power, largest_rise=largest_rise, largest_fall=largest_fall
            )
            weight = jnp.maximum(jnp.asarray(step.weight, state.seen.dtype), 1 / (state.seen + 1))
            weight = jnp.where(scaled.is_evidence, weight, 0)
            new = curvatures_along(scaled.gradient, structures, state.factors, precision=self.precision)
            average = lambda old, h: old + weight.astype(old.dtype) * (h.astype(old.dtype) - old)
            average_rows = lambda old, h: jnp.where(h > 0, average(old, h), old)
            averages = [
                jax.tree.map(average_rows if structure.is_diagonal else average, old, h)
                for structure, old, h in zip(structures, state.statistics, new, strict=True)
            ]
            power = jnp.clip(average(state.power, scaled.power), 1 / _LARGEST_POWER, _LARGEST_POWER)
            # Each surprise may leave e a little lower, in units in which all that follows is larger.
            drift = exponent_of(power)
            drift = jnp.where(jnp.abs(drift) > _LARGEST_DRIFT, drift >> 1, 0)
            unit = scale_by_exponent(jnp.ones_like(power), -2 * drift)
            return state._replace(
                statistics=tuple([times_scalar(parts, unit) for parts in averages]),
                exponent=scaled.exponent + drift,
                power=scale_by_exponent(power, -2 * drift),
                seen=state.seen + scaled.is_evidence.astype(state.seen.dtype),
                last_momentum=scale_by_exponent(state.last_momentum, -drift),
                retained=state.retained * (1 - weight),
            )

    def refresh(
        self, state: CurvatureState, gradient: jax.Array, *, structures: Structures, step: Step
    ) -> CurvatureState:
        """Renews every K from the one before, K ← K (KᵀS̃K)^(−1/2); factors that come out non-finite are refused."""
        [stack] = self.refresh_stacks([jax.tree.map(lambda leaf: leaf[None], state)], [gradient], [structures], step)
        return jax.tree.map(lambda leaf: leaf[0], stack)

    def refresh_stacks(
        self,
        states: Sequence[CurvatureState],
        gradients: Sequence[jax.Array],
        structures: Sequence[Structures],
        step: Step,
    ) -> list[CurvatureState]:
        """Renews every K of several stacks, see `refresh`: all axes of one length, rounded up, as one batch."""
        del gradients
        with jax.named_scope("refresh"):
            sizes = [
                jax.vmap(functools.partial(_measure_sizes, structures=of_stack))(state)
                for of_stack, state in zip(structures, states, strict=True)
            ]
            plan = jax.vmap(functools.partial(_axis_inputs, step=step))
            inputs = [axis for state, own in zip(states, sizes, strict=True) for axis in plan(state, own)]
            kinds = [s for of_stack in structures for s in of_stack]
            refreshed = iter(self._refresh_together(inputs, kinds))
            keep = jax.vmap(functools.partial(self._keep_finite, step=step))
            return [
                keep(state, own, [next(refreshed) for _ in of_stack])
                for state, own, of_stack in zip(states, sizes, structures, strict=True)
            ]

    def _refresh_together(self, inputs: Sequence["_AxisInput"], structures: Structures) -> list["_RefreshedAxis"]:
        """Returns `_refresh_axis` of several stacks' inputs: one structure, or dense ones about as long, at once."""
        batches: dict[tuple[Any, ...], list[int]] = {}
        for index, (axis, structure) in enumerate(zip(inputs, structures, strict=True)):
            kind = (_rounded_length(structure) or structure, axis.factor[0].dtype, axis.statistics[0].dtype)
            batches.setdefault(kind, []).append(index)
        refreshed: dict[int, _RefreshedAxis] = {}
        for members in batches.values():
            whole = max([structures[index] for index in members], key=operator.attrgetter("dim"))
            is_padded = {structures[index] for index in members} != {whole}
            padded = [
                _pad(inputs[index], structures[index], whole) if is_padded else inputs[index] for index in members
            ]
            batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *padded)
            result = jax.vmap(functools.partial(self._refresh_axis, structure=whole))(batch)
            first = 0
            for index in members:
                last = first + len(inputs[index].retained)
                own = jax.tree.map(operator.itemgetter(slice(first, last)), result)
                refreshed[index] = _crop(own, structures[index].dim) if is_padded else own
                first = last
        return [refreshed[index] for index in range(len(inputs))]

    def _refresh_axis(self, axis: "_AxisInput", *, structure: Structure) -> "_RefreshedAxis":
        """Returns `derive_factor` of K (KᵀS̃K)^(−1/2) for one axis of one block."""
        k, s, damping, retained = axis
        # Both numbers are vectors where rows are padding: zero there, so that the padding of all matrices stays zero.
        damped = structure.add_identity(s, damping)
        product = structure.congruence(k, damped)
        is_row = (retained > 0).astype(retained.dtype)
        mean = structure.trace(product) / jnp.sum(jnp.broadcast_to(is_row, structure.dim))
        # What S has lost is the least that S̃ can have shrunk by, and a margin for what K was off by. But where S has
        # grown by more than an inverse root spans, the spectrum lies about its mean, not about one: K would grow where
        # it is to shrink, and each refresh would leave it further off.
        shift = 0.8 * jnp.maximum(jnp.max(retained), mean / LARGEST_CONDITION)
        excess = structure.add_identity(product, -shift * is_row)
        factor = structure.times_inverse_root(k, excess, shift=shift, precision=self.precision)
        factor, derived = self.derive_factor(factor, damped, structure)
        return _RefreshedAxis(factor, derived, mean, max_abs((*factor, *(derived or ()))))

    def _keep_finite(
        self, state: CurvatureState, sizes: "_Sizes", refreshed: Sequence["_RefreshedAxis"], *, step: Step
    ) -> CurvatureState:
        """Returns a block's state with new factors, if all of them are finite."""
        axes = len(refreshed)
        is_finite = jnp.all(jnp.isfinite(jnp.stack([new.largest for new in refreshed])))
        keep = is_finite & (state.seen > 0)
        growths = jnp.where(keep, jnp.stack([new.growth.astype(sizes.mean.dtype) for new in refreshed]), 1)
        growths = jnp.clip(growths, 1 / _LARGEST_POWER, _LARGEST_POWER)
        # A part u of each S̃ is λ's, or of gradients since the last refresh, in the metric of the K of then. All N axes
        # answer a change of the gradients, so that together they answer N·u times. Above one they overshoot, and swing.
        absolute = _absolute_part(state, sizes, step) / growths[0]
        answers = axes * (1 - state.retained.astype(absolute.dtype) * (1 - absolute))
        overshoot = growths ** (1 - 1 / jnp.maximum(answers, 1))
        # c·S₁ and S₂/c act alike, so that nothing holds c, and gradients that fade or grow take S with them. So powers
        # of two of S's axes go to 2ᵉ, and those of mean(x²) come back, to one axis after the other. They are halved by
        # shifts, as a floor division of integers is a dozen operations.
        own = (exponent_of(sizes.mean / overshoot) + 4) >> 3
        rest = (exponent_of(scale_by_exponent(state.power, -8 * jnp.sum(own, dtype=own.dtype))) + 4) >> 3
        shifts = jnp.where(keep, own + (rest + jnp.arange(axes, dtype=own.dtype)) // axes, 0)
        total = jnp.sum(shifts, dtype=shifts.dtype)

        def rescale(matrices: Sequence[Any], degree: float) -> tuple[Parts, ...]:
            numbers = scale_by_exponent(overshoot**degree, round(8 * degree) * shifts)
            return tuple([times_scalar(parts, number) for parts, number in zip(matrices, numbers, strict=True)])

        store = lambda new, old: jnp.where(keep, round_dithered(new, old.dtype, step.count), old)
        factors, derived = zip(*[(new.factor, new.derived) for new in refreshed], strict=True)
        old = state.preconditioners
        return state._replace(
            statistics=rescale(state.statistics, -1),
            factors=jax.tree.map(store, rescale(factors, 0.5), state.factors),
            preconditioners=old and jax.tree.map(store, rescale(derived, self.degrees[1]), old),
            exponent=state.exponent + 4 * total,
            power=scale_by_exponent(state.power, -8 * total),
            retained=jnp.where(keep, 1, state.retained),
            last_momentum=scale_by_exponent(state.last_momentum, -4 * total),
            refused=state.refused + (~is_finite).astype(jnp.int32),
        )

    def precondition(
        self, state: CurvatureState, momentum: jax.Array, *, gradient: jax.Array, structures: Structures, step: Step
    ) -> tuple[jax.Array, CurvatureState]:
        """Returns D at the length that `step_size` says."""
        with jax.named_scope("apply"):
            wide = upcast(momentum)
            scaled = scale_by_exponent(wide, -state.exponent)
            # A momentum of gradients that are gone may be as much larger as the step will be shorter.
            scaled = jnp.where(jnp.isfinite(wide), jnp.clip(scaled, -_LARGEST_POWER, _LARGEST_POWER), wide)
            direction = self.precondition_momentum(state, scaled, structures)
            if self.step_size == "newton":
                length, is_short = self._newton_length(state, scaled, direction, step)
            else:
                length, is_short, state = self._adamw_length(state, scaled, gradient, direction, step)
            return direction * length, state._replace(shortened=state.shortened + is_short.astype(jnp.int32))

    def _adamw_length(
        self, state: CurvatureState, momentum: jax.Array, gradient: jax.Array, direction: jax.Array, step: Step
    ) -> tuple[jax.Array, jax.Array, CurvatureState]:
        """Returns what to multiply D by, whether that is less than the full length, and the state."""
        size = jnp.sqrt(jnp.mean(jnp.square(momentum)))  # of entries that are clipped, whose squares are numbers
        is_silent = jnp.max(jnp.abs(gradient)) == 0  # what the stacks' state keeps, too, so that it costs no pass
        agreement = self._average_agreement(state, momentum, gradient, step)
        rms = self.rms + (1 - self.rms) * jnp.where(is_silent, 0, jnp.clip(2 * agreement, 0, 1)).astype(size.dtype)
        last = jnp.where(is_silent | ~jnp.isfinite(size), state.last_momentum, size.astype(state.last_momentum.dtype))
        fading = jnp.where(is_silent, size / jnp.where(last > 0, last, 1).astype(size.dtype), 1)
        excess = size / (_LARGEST_MOMENTUM * jnp.sqrt(state.power).astype(size.dtype))
        excess = jnp.where(step.is_own_curvature, excess, 0)  # another's size tells nothing of the gradients'
        scale = self.scale(state)
        below = jnp.where(scale > NO_SCALE, scale - step.largest_scale, 0)
        part = jnp.exp2(jnp.minimum(below, 0)) / _LEAST_PART
        shortening = jnp.minimum(jnp.minimum(fading, part.astype(size.dtype)), 1 / jnp.maximum(excess, 1))
        mean, root, largest = measure_entries(direction)
        root = jnp.where(root > 0, root, 1)
        shortening = jnp.minimum(shortening, _DENSE * mean / root)
        shortening = jnp.minimum(shortening, _LARGEST_ENTRY * root / jnp.where(largest > 0, largest, 1))
        return shortening * rms / root, shortening < 1, state._replace(last_momentum=last, agreement=agreement)

    @staticmethod
    def _average_agreement(state: CurvatureState, momentum: jax.Array, gradient: jax.Array, step: Step) -> jax.Array:
        """Returns the moving average of cos(G, M), M the momentum before G.

        It is minus the slope of the loss along the last step, up to the preconditioner: positive where a longer step
        would have been better, near zero in noise, and not positive on average where steps swing about a minimum. The
        momentum that holds G already would not tell: it agrees with G there, too.
        """
        newest = jnp.asarray(step.newest, momentum.dtype)
        gradient = scale_by_exponent(upcast(gradient), -state.exponent)
        before = momentum - newest * gradient
        squares = jnp.sum(jnp.square(gradient)) * jnp.sum(jnp.square(before))
        is_known = (squares > 0) & jnp.isfinite(squares)
        cosine = jnp.where(is_known, jnp.sum(gradient * before), 0) / jnp.sqrt(jnp.where(is_known, squares, 1))
        weight = (newest * (1 - newest)).astype(state.agreement.dtype)  # zero where there was no gradient before
        return state.agreement + weight * (cosine.astype(state.agreement.dtype) - state.agreement)

    def _newton_length(
        self, state: CurvatureState, momentum: jax.Array, direction: jax.Array, step: Step
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what makes D, of the scaled momentum, one of M and the curvature B·S, and whether it is shortened.

        A step that is L long in the metric of the curvature, L = rms(M ×ₙ Kₙᵀ), is shortened to min(1, (r/L)²) of it:
        with the gradient at hand in the curvature, Sherman's and Morrison's formula gives L² rather than L.
        """
        dtype = direction.dtype
        in_momentum, in_curvature = self.degrees
        scale = jnp.exp2((in_momentum - 2 * in_curvature) * state.exponent.astype(dtype))
        length = scale * jnp.asarray(step.batch_size, dtype) ** -in_curvature
        if self.trust_radius is None:
            return length, jnp.zeros([], bool)
        excess = self.squared_length(momentum, direction) / jnp.square(jnp.asarray(self.trust_radius, dtype))
        return length / jnp.maximum(excess, 1), excess > 1

    def flops(self, structures: Structures) -> BlockFlops:
        """Returns the operations of the products; those of diagonal structures count, too."""
        size = math.prod([structure.dim for structure in structures])
        folded = fold_structures(structures, group_axes(structures, [jnp.dtype(jnp.float32)] * len(structures)))
        counts = count_other_transposes(folded)
        each = [structure.flops(size // structure.dim) for structure in folded]
        return BlockFlops(
            observe=sum([count * f.apply + f.project_outer for count, f in zip(counts, each, strict=True)]),
            refresh=(_REFRESH_PRODUCTS + self.root_products) * sum([s.flops(1).matmul for s in structures]),
            precondition=self.applications * sum([flops.apply for flops in each]),
        )

    def supports(self, structure: Structure) -> str | None:
        """Returns why a structure has no statistics of its own, if it is not closed under transposition."""
        if structure.is_symmetric:
            return None
        return (
            "this method needs structures that are closed under transposition (dense, diagonal, block-diagonal). Use "
            "rf.published.sirf_shampoo for others."
        )


class _Sizes(NamedTuple):
    """How large a block's matrices are, for each axis, [axes].

    Attributes:
      mean: tr(S)/d.
      inverse: tr(KKᵀ)/d.
      floor: the least damping that the dtypes of K and S need.
    """

    mean: jax.Array
    inverse: jax.Array
    floor: jax.Array


class _AxisInput(NamedTuple):
    """What a factor is refreshed from.

    Attributes:
      factor: the parts of K.
      statistics: the parts of S.
      damping: what is added to S's diagonal.
      retained: which part of the S of the last refresh is left; more than 0.
    """

    factor: Parts
    statistics: Parts
    damping: jax.Array
    retained: jax.Array


class _RefreshedAxis(NamedTuple):
    """A refreshed factor of one axis.

    Attributes:
      factor: the parts of K.
      derived: the parts of the preconditioner that is made of it, or None.
      growth: tr(KᵀS̃K)/d with the K before: by how much S̃ is larger than at the last refresh.
      largest: the largest absolute entry of both matrices; not finite if an entry is not.
    """

    factor: Parts
    derived: Parts | None
    growth: jax.Array
    largest: jax.Array


def _measure_sizes(state: CurvatureState, *, structures: Structures) -> _Sizes:
    """Returns the sizes of a block's matrices."""
    dtype = functools.reduce(jnp.promote_types, [s[0].dtype for s in state.statistics])
    sizes = []
    for structure, s, k in zip(structures, state.statistics, state.factors, strict=True):
        resolution = float(jnp.finfo(s[0].dtype).eps) / 8
        floor = _LOW_PRECISION_FLOOR if is_low_precision(k[0].dtype) else resolution
        mean, inverse = structure.trace(s) / structure.dim, structure.squared_norm(k) / structure.dim
        of_axis = mean, inverse, floor * jnp.sqrt(structure.squared_norm(s))
        sizes.append(jnp.stack([number.astype(dtype) for number in of_axis]))
    return _Sizes(*jnp.stack(sizes, axis=1))


def _absolute_part(state: CurvatureState, sizes: _Sizes, step: Step) -> jax.Array:
    """Returns λ's part of tr(KₙᵀS̃ₙKₙ)/dₙ, which is the same for each axis."""
    absolute = jnp.asarray(step.absolute_damping / step.batch_size, sizes.inverse.dtype)
    # One by one: the product of the others alone may overflow where λ is zero.
    return math.prod([*sizes.inverse], start=scale_by_exponent(absolute, -2 * state.exponent))


def _axis_inputs(state: CurvatureState, sizes: _Sizes, *, step: Step) -> list[_AxisInput]:
    """Returns what a block's factors are refreshed from, for each axis."""
    relative = jnp.maximum(jnp.asarray(step.damping, sizes.mean.dtype) * sizes.mean, sizes.floor)
    dampings = relative + _absolute_part(state, sizes, step) / sizes.inverse
    retained = jnp.clip(state.retained, _LEAST_RETAINED, 1)
    return [
        _AxisInput(k, s, damping.astype(s[0].dtype), retained.astype(s[0].dtype))
        for k, s, damping in zip(state.factors, state.statistics, dampings, strict=True)
    ]


def _rounded_length(structure: Structure) -> int | None:
    """Returns what lengths share a program with a dense structure's, as the longest of them; None for other structures.

    It is at most half as long again, and at least 16. The lengths of an octave have two programs.
    """
    if not structure.is_dense or structure.dim == 1:
        return None
    unit = max(_SHORTEST, 2 ** (structure.dim - 1).bit_length() // 4)
    return math.ceil(structure.dim / unit) * unit


def _pad(axis: _AxisInput, structure: Structure, whole: Structure) -> _AxisInput:
    """Returns the inputs of a stack for a longer structure: their matrices are zero in the rows and columns beyond."""
    rows = [(0, 0), (0, whole.dim - structure.dim)]
    widen = lambda part: part if part.shape[-1] == whole.dim else jnp.pad(part, [*rows, rows[1]])
    inside = jnp.arange(whole.dim) < structure.dim
    vector = lambda number: jnp.where(inside, number[:, None], 0)
    factor, statistics = jax.tree.map(widen, (axis.factor, axis.statistics))
    return _AxisInput(factor, statistics, vector(axis.damping), vector(axis.retained))


def _crop(refreshed: _RefreshedAxis, dim: int) -> _RefreshedAxis:
    """Returns a stack's refreshed dense factors without the rows and columns that `_pad` added."""
    factor, derived = jax.tree.map(lambda part: part[:, :dim, :dim], (refreshed.factor, refreshed.derived))
    return refreshed._replace(factor=factor, derived=derived)


_register = functools.partial(
    jax.tree_util.register_dataclass, data_fields=["trust_radius"], meta_fields=["step_size", "precision"]
)


@_register
@dataclasses.dataclass(frozen=True)
class RootFree(CurvatureRule):
    """The root-free step, D = M ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ (Lin et al. 2024)."""

    degrees = 1.0, 1.0

    def squared_length(self, momentum: jax.Array, direction: jax.Array) -> jax.Array:
        """Returns mean⟨M, D⟩."""
        return jnp.mean(momentum * direction)

    def precondition_momentum(self, state: CurvatureState, momentum: jax.Array, structures: Structures) -> jax.Array:
        """Returns M ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ."""
        return apply_factors(
            momentum, state.factors, structures=structures, transposed_first=True, precision=self.precision
        )


@_register
@dataclasses.dataclass(frozen=True)
class Whitening(CurvatureRule):
    """The whitening step, D = M ×₁ S̃₁^(−1/2) … ×_N S̃_N^(−1/2) (KL-Shampoo, Lin et al., arXiv 2509.03378).

    K is kept symmetric positive definite, so that it is S̃^(−1/2).
    """

    degrees = 1.0, 0.5
    applications = 1
    root_products = _SYMMETRIC_ROOT_PRODUCTS

    def squared_length(self, momentum: jax.Array, direction: jax.Array) -> jax.Array:
        """Returns mean(D²)."""
        return jnp.mean(jnp.square(direction))

    def derive_factor(self, factor: Parts, damped: Parts, structure: Structure) -> tuple[Parts, Parts | None]:
        """Returns the symmetric factor of equal K Kᵀ."""
        del damped
        return structure.symmetric_root(factor, precision=self.precision), None

    def precondition_momentum(self, state: CurvatureState, momentum: jax.Array, structures: Structures) -> jax.Array:
        """Returns M ×₁ K₁ … ×_N K_N."""
        return apply_factors(
            momentum, state.factors, structures=structures, transposed_first=False, precision=self.precision
        )


@functools.partial(_register, meta_fields=["power", "step_size", "precision"])
@dataclasses.dataclass(frozen=True)
class Spectral(CurvatureRule):
    """The spectral step, D = msign(M ×ₙ S̃ₙ^(−q)) ×ₙ S̃ₙ^(−q): Muon in the metric of the curvature's power 2q.

    At q = 1/2 it is FISMO's (arXiv 2601.21750), at q = 1/8 Mousse's (arXiv 2603.09697), both with other statistics. A
    tensor of more axes is orthogonalized as the matrix [all but the last] × [last].

    Args:
      power: q, one of 1/2, 1/4, 1/8.
    """

    power: float = 0.25

    def options(self) -> Mapping[str, Any]:
        """Returns the power: preconditioners are of it until the next refresh."""
        return {"power": float(self.power)}

    @property
    def root_products(self) -> int:
        """How many products of square matrices `derive_factor` takes for each axis."""
        return 0 if self.power == 0.5 else _SYMMETRIC_ROOT_PRODUCTS + _ROOTS[self.power] * _POSITIVE_ROOT_PRODUCTS

    def flops(self, structures: Structures) -> BlockFlops:
        """Returns the operations, those of the orthogonalization included."""
        *others, columns = [structure.dim for structure in structures]
        short, long = sorted([math.prod(others), columns])
        flops = super().flops(structures)
        return flops._replace(precondition=flops.precondition + 5 * (4 * short**2 * long + 2 * short**3))

    @property
    def degrees(self) -> tuple[float, float]:
        """The powers of the momentum and of the inverse curvature that D is made of."""
        return 0.0, self.power

    def derive_factor(self, factor: Parts, damped: Parts, structure: Structure) -> tuple[Parts, Parts | None]:
        """Returns the factor, and S̃^(−q) for q < 1/2: roots of the symmetric root."""
        if self.power == 0.5:
            return factor, None
        power = structure.symmetric_root(factor, precision=self.precision)
        least = structure.squared_norm(damped) ** -0.25  # S̃^(−1/2) is at least ‖S̃‖_F^(−1/2)
        for _ in range(_ROOTS[self.power]):
            power = structure.positive_root(power, least, precision=self.precision)
            least = jnp.sqrt(least)
        return factor, power

    def precondition_momentum(self, state: CurvatureState, momentum: jax.Array, structures: Structures) -> jax.Array:
        """Returns msign(M ×ₙ Kₙᵀ) ×ₙ Kₙ, or the same with S̃ₙ^(−q) in place of Kₙ."""
        matrices = state.factors if state.preconditioners is None else state.preconditioners
        if has_smaller_range(matrices[0][0].dtype, momentum.dtype):
            # msign forgets the size, which float16 may not hold.
            momentum = momentum / power_of_two(exponent_of(jnp.max(jnp.abs(momentum)))).astype(momentum.dtype)
        w = apply_transposes(momentum, matrices, structures=structures, precision=self.precision)
        matrix = orthogonalize(w.reshape(-1, w.shape[-1]), precision=self.precision)
        return apply_factors(
            matrix.reshape(w.shape), matrices, structures=structures, transposed_first=False, precision=self.precision
        )

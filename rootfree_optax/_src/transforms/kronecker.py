"""Inverse-free root-free Shampoo as a transformation: plan, pack, refresh, precondition, unpack."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.common import schedules, validate
from rootfree_optax._src.common.schedules import UpdateEvery
from rootfree_optax._src.layout import Layout
from rootfree_optax._src.layout.rules import DTypeRule
from rootfree_optax._src.mesh import stacks_on_mesh as sharded_plan
from rootfree_optax._src.mesh.stacks_on_mesh import BlockAxes
from rootfree_optax._src.stacks import stacks
from rootfree_optax._src.stacks.kronecker_options import FactorOptions, InitialScale, Refresh
from rootfree_optax._src.stacks.momentum import GradientAverage
from rootfree_optax._src.transforms import factor_stacks
from rootfree_optax._src.transforms.factor_stacks import FactorStacks


class ScaleBySirfShampooState(NamedTuple):
    """State of `scale_by_sirf_shampoo`.

    Attributes:
      count: how many updates there have been.
      factors: for each stack of the plan, for each axis, the parts of the factors K with a leading axis of blocks.
      momenta: the same for the factors' Riemannian momentum m; empty without.
      products: the same for K Kᵀ; empty unless they are cached.
      started: for each stack, which blocks' factors have been scaled to their first gradient; empty unless they are to.
      observed: for each stack, the sums of the outer products since the last refresh, as its factors, and of how many
        gradients those of each block are; empty without `curvature_every`.
      velocity: for each stack, the gradients' heavy-ball average v; empty without `momentum`.
    """

    count: jax.Array  # type: ignore[assignment]  # Optax names it so, and tuples have a method of that name
    factors: Any
    momenta: Any
    products: Any = ()
    started: Any = ()
    observed: Any = ()
    velocity: Any = ()


def scale_by_sirf_shampoo(
    preconditioner_lr: optax.ScalarOrSchedule | None = None,
    damping: optax.ScalarOrSchedule = 2e-4,
    riemannian_momentum: ArrayLike | None = None,
    *,
    batch_size: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    update_every: UpdateEvery = 1,
    staggered: bool = False,
    curvature_every: UpdateEvery | None = None,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    preconditioner_dtype: DTypeRule = None,
    refresh: Refresh = "exact",
    initial_scale: InitialScale = "first_gradient",
    trust_radius: ArrayLike | None = None,
    cache_products: bool = False,
    block_axes: BlockAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients by structured Kronecker factors, without inverses or roots (SIRF-Shampoo).

        stepₙ = Π̂( X₍ₙ₎X₍ₙ₎ᵀ + λ·Π_{j≠n} Tr(KⱼᵀKⱼ)·KₙᵀKₙ ) / (2 Π_{j≠n} dⱼ) − I/2,   X = √B·G ×₁ K₁ᵀ … ×_N K_Nᵀ
        Kₙ ← Kₙ (I + 2β₂·stepₙ)^(−1/2)                                                 (refresh="exact")
        mₙ ← α₂ mₙ + (1 − α₂) stepₙ,   Kₙ ← Kₙ − β₂ / max(1, ‖mₙ‖_F) · Kₙ mₙ            (refresh="published")
        direction = G ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ

    G is a block of the gradient with axes of lengths d₁…d_N, and KₙKₙᵀ approximates the inverse of the loss's curvature
    along axis n. Only matrix products are used, so factors may be in bfloat16. Blocks of one shape form one stack and
    one batched product: the program does not grow with the model's depth.

    The exact refresh does RF-Shampoo's S ← (1 − β₂)·S + β₂·H for S = (K Kᵀ)⁻¹, whatever the width, with an inverse root
    made of eight products (see `inverse_root`). It shrinks a dense K by at most 32 times, as after a gradient some
    thirty times as large as those before: what is larger yet takes further refreshes. The published one is a clipped
    first-order step: relative to K it is at most β₂, so that wide layers, long intervals and sudden large gradients
    need many refreshes. It is what the paper and the official code do, with `preconditioner_lr=0.2,
    riemannian_momentum=0.5, initial_scale=1.0` or the like.

    A block with a non-finite gradient, or whose factors would come out non-finite, keeps its factors; its direction is
    not finite where its gradient is not, and mostly elsewhere too. `optax.apply_if_finite` keeps such gradients out.

    Args:
      preconditioner_lr: β₂ ≥ 0, and below 1 for the exact refresh. A number, a traced scalar or a schedule. None, for
        the exact refresh at a known interval, is `averaging_schedule(0.1, update_every)`.
      damping: λ ≥ 0. A number, a traced scalar or a schedule.
      riemannian_momentum: α₂, in [0, 1). A number or a traced scalar; None or 0 keeps no momentum state. The exact
        refresh takes none: m would hold steps relative to a K of long ago, and after one large gradient shrink K again
        and again. What m averages, S averages already.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      momentum: in [0, 1): the gradients' heavy-ball average v ← momentum·v + G takes G's place in the direction, not
        in X. A number or a traced scalar; None averages nothing and keeps no v.
      nesterov: whether it is Nesterov's, G + momentum·v.
      accumulator_dtype: floating-point dtype of v; by default the widest dtype of the parameters in a stack.
      update_every: T ≥ 1, the factors are refreshed at every T-th update, the first one included; or a callable from
        the number of past updates to whether this one refreshes, for example `growing_interval(10)`.
      staggered: whether every update refreshes a T-th of the blocks, in turn, so that no update takes longer than
        others. T is a Python int then.
      curvature_every: c ≥ 1: a refresh takes the mean curvature of every c-th gradient since the last one; or a
        callable, as above. The sums are as large as the factors, and each gradient in them costs two products an axis.
        None takes the curvature of the refresh's own gradient, and keeps no sums.
      layout: how parameters become blocks, and the structure of their factors.
      preconditioner_dtype: floating-point dtype of the factors, or a tuple of one per (squeezed, merged) axis, or a
        mapping from the number of axes to either; by default the widest dtype of the parameters in a stack.
      refresh: "exact", for structures whose refresh has a closed form: dense, diagonal and block-diagonal ones,
        hierarchical ones, and those with a corner that the diagonal's columns reach (`triltopleftdiag`,
        `triubottomrightdiag`). Where (1 − β₂)·S + β₂·H leaves the structure, K becomes the one within it whose K Kᵀ is
        nearest to the inverse by the Kullback–Leibler divergence. Or "published", for all structures.
      initial_scale: s > 0, the curvature before the first step: the factors of N axes start at s^(−1/2N)·I. Or
        "first_gradient": each block's s is B·mean(g²) + λ over the non-zero entries of its first non-zero gradient.
      trust_radius: r > 0, how long a block's direction D of G may be in the metric of the curvature estimate, where its
        length is √(B·mean(G·D)): about 1 if the estimate is right for G, and more for a G that factors of some steps
        ago did not expect. For T > 1; None shortens nothing.
      cache_products: whether K Kᵀ is kept in the state, as large as K, which halves the products of a step without
        refresh. For structures that are closed under transposition: dense, diagonal and block-diagonal ones.
      block_axes: name of a mesh axis, or a tuple of names, over which the blocks of every stack are divided, state and
        work; None divides nothing. The mesh is that of `jax.set_mesh`, or else the one that the arrays are on; inside
        `jax.shard_map` over these axes the state is a device's own part. See `state_shardings`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      A transformation whose `update` takes two extra arguments: `batch_size`, and `curvature`, a tree like the
      gradients (or with one more leading axis of samples) that takes G's place in X.

    Raises:
      ValueError: at construction for a Python number out of range, or without a `preconditioner_lr` where it has no
        default; at `init` for a layout that does not fit a parameter; at the first `update` without any batch size, or
        for gradients or a state unlike the parameters; at both without a mesh that has the `block_axes`.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not real floating
        point.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.scale_by_sirf_shampoo(0.5, 0.0, refresh="published", initial_scale=1.0, batch_size=1)
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> state = tx.init(params)
      >>> direction, state = tx.update({"kernel": jnp.eye(2, 3)}, state)
      >>> k1, k2 = rf.Layout().plan(params).factors(state)["kernel"]
      >>> print(f"{k1[0, 0]:.3f}")
      1.167

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    at_construction = batch_size
    validate.require_kronecker(preconditioner_lr, damping, batch_size, update_every)
    sharded_plan.require_block_axes(block_axes)
    average = GradientAverage(momentum, nesterov, accumulator_dtype)
    options = FactorOptions(
        preconditioner_dtype=preconditioner_dtype,
        riemannian_momentum=None if validate.is_zero(riemannian_momentum) else riemannian_momentum,
        refresh=refresh,
        initial_scale=initial_scale,
        update_every=update_every,
        staggered=staggered,
        curvature_every=curvature_every,
        trust_radius=trust_radius,
        cache_products=cache_products,
        precision=precision,
    )
    preconditioner_lr = options.rate(preconditioner_lr)

    def init(params: optax.Params) -> ScaleBySirfShampooState:
        plan = sharded_plan.for_parameters(layout.plan(params), block_axes, params)
        kept = factor_stacks.initial(plan, params, options)
        arrays = stacks.typed_as_updated(plan, params, (*kept, average.initial(plan, params, kept.factors)))
        return ScaleBySirfShampooState(jnp.zeros([], jnp.int32), *arrays)

    def update(
        updates: optax.Updates,
        state: ScaleBySirfShampooState,
        params: optax.Params | None = None,
        *,
        batch_size: ArrayLike | None = None,
        curvature: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySirfShampooState]:
        del extra_args
        count, *kept, velocity = state
        batch_size = schedules.resolve_batch_size(batch_size, at_construction)
        plan = sharded_plan.for_state(layout, block_axes, state.factors, updates, params)
        gradients = stacks.pack(plan, updates)
        new = factor_stacks.renewed(
            plan,
            stacks.curvatures(plan, curvature, updates, gradients),
            FactorStacks(*kept),
            options,
            preconditioner_lr=schedules.value_at(preconditioner_lr, count),
            damping=schedules.value_at(damping, count),
            batch_size=batch_size,
            count=count,
        )
        averages, velocity = average.update(plan, gradients, velocity)
        matrices = new.products if cache_products else new.factors
        directions = stacks.precondition(plan, options.precondition_block(batch_size), averages, matrices)
        new_state = ScaleBySirfShampooState(optax.safe_increment(count), *new, velocity)
        return stacks.unpack(plan, directions, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)

"""Whole Kronecker optimizers: one `optax.chain` each."""

from typing import Any, Literal

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.common import validate
from rootfree_optax._src.common.schedules import UpdateEvery
from rootfree_optax._src.layout import Layout
from rootfree_optax._src.layout.rules import DTypeRule
from rootfree_optax._src.mesh.stacks_on_mesh import BlockAxes
from rootfree_optax._src.optimizers.links import MaskOrFn, descent, heavy_ball
from rootfree_optax._src.stacks.kronecker_options import InitialScale, Refresh
from rootfree_optax._src.transforms.kronecker import scale_by_sirf_shampoo
from rootfree_optax._src.transforms.kronecker_inverse import scale_by_rf_shampoo

MomentumOf = Literal["directions", "gradients"]


def sirf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preconditioner_lr: optax.ScalarOrSchedule | None = None,
    damping: optax.ScalarOrSchedule = 2e-4,
    momentum: ArrayLike | None = 0.6,
    momentum_of: MomentumOf = "gradients",
    nesterov: bool = True,
    riemannian_momentum: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    update_every: UpdateEvery = 1,
    staggered: bool = False,
    curvature_every: UpdateEvery | None = None,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    preconditioner_dtype: DTypeRule = None,
    refresh: Refresh = "exact",
    initial_scale: InitialScale = "first_gradient",
    trust_radius: ArrayLike | None = None,
    cache_products: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    block_axes: BlockAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SIRF-Shampoo: structured Shampoo without inverses and without the square root.

        v ← momentum·v + G
        θ ← θ − learning_rate·(v ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ + κθ)   (momentum_of="gradients")

        v ← momentum·v + G ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ + κθ
        θ ← θ − learning_rate·v                             (momentum_of="directions")

    See `scale_by_sirf_shampoo` for the factors K. The method as published is

        sirf_shampoo(η, refresh="published", preconditioner_lr=0.2, riemannian_momentum=0.5, initial_scale=1.0,
                     momentum=0.9, momentum_of="directions", nesterov=False, batch_size=B)

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      preconditioner_lr: β₂ ≥ 0, the weight of the newest curvature (exact refresh), or the step size of the factors.
        None, for the exact refresh, is `averaging_schedule(0.1, update_every)`.
      damping: λ ≥ 0.
      momentum: α₁, heavy-ball momentum in [0, 1). None keeps no momentum state, and `momentum_of` and `nesterov` say
        nothing then.
      momentum_of: what v averages: "gradients", whose average the present factors apply to, so that nothing in v is by
        factors of long ago; or "directions", as published, each by the factors of its own step.
      nesterov: whether Nesterov's momentum takes the place of v, as in `optax.trace`.
      riemannian_momentum: α₂, in [0, 1), the factors' momentum, for the published refresh. None or 0 keeps no state.
      weight_decay: κ ≥ 0, added to the direction, before its momentum if it has one. None adds nothing and needs no
        parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      update_every: T ≥ 1: the factors are refreshed at every T-th update; or a callable, see `scale_by_sirf_shampoo`.
      staggered: whether every update refreshes a T-th of the blocks, in turn, so that none takes long.
      curvature_every: c ≥ 1: a refresh takes the mean curvature of every c-th gradient since the last one, see
        `scale_by_sirf_shampoo`. None takes that of the refresh's own gradient.
      layout: how parameters become blocks, and the structure of their factors.
      preconditioner_dtype: floating-point dtype of the factors, see `scale_by_sirf_shampoo`.
      refresh: "exact" or "published", see `scale_by_sirf_shampoo`.
      initial_scale: the curvature before the first step, > 0, or "first_gradient", see `scale_by_sirf_shampoo`.
      trust_radius: r > 0, how long a block's direction may be in the metric of the curvature, for T > 1, see
        `scale_by_sirf_shampoo`. Momentum of gradients makes it longer, to about √(1 / (1 − momentum²)): try 3.
      cache_products: whether K Kᵀ is kept in the state: steps without refresh take half the products.
      accumulator_dtype: floating-point dtype of v; by default each parameter's own, or for momentum of gradients the
        widest of those whose blocks have one shape.
      block_axes: mesh axes over which stacks of blocks are divided, see `scale_by_sirf_shampoo`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer. Print `layout.plan(params)` to see how large its factors are and what its steps cost.

    Raises:
      ValueError: see `scale_by_sirf_shampoo`.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not real floating
        point.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.sirf_shampoo(0.1, damping=0.1, batch_size=1)
      >>> x = jnp.zeros((2, 3))
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    average = (momentum, momentum_of, nesterov, accumulator_dtype)
    preconditioner = scale_by_sirf_shampoo(
        preconditioner_lr,
        damping,
        riemannian_momentum,
        batch_size=batch_size,
        **_of_gradients(*average),
        update_every=update_every,
        staggered=staggered,
        curvature_every=curvature_every,
        layout=layout,
        preconditioner_dtype=preconditioner_dtype,
        refresh=refresh,
        initial_scale=initial_scale,
        trust_radius=trust_radius,
        cache_products=cache_products,
        block_axes=block_axes,
        precision=precision,
    )
    return optax.chain(preconditioner, *descent(learning_rate, weight_decay, mask, _of_directions(*average)))


def rf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preconditioner_lr: optax.ScalarOrSchedule = 0.2,
    damping: optax.ScalarOrSchedule = 2e-4,
    momentum: ArrayLike | None = 0.6,
    momentum_of: MomentumOf = "directions",
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    update_every: UpdateEvery = 1,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    accumulator_dtype: DTypeLike | None = None,
    block_axes: BlockAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-Shampoo: Shampoo without the square root, with inverses.

        v ← momentum·v + G ×₁ S₁⁻¹ … ×_N S_N⁻¹ + κθ
        θ ← θ − learning_rate·v                             (momentum_of="directions")

        v ← momentum·v + G
        θ ← θ − learning_rate·(v ×₁ S₁⁻¹ … ×_N S_N⁻¹ + κθ)      (momentum_of="gradients")

    See `scale_by_rf_shampoo` for the factors S. For comparison and small problems; `sirf_shampoo` is the fast one.

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      preconditioner_lr: β₂, in [0, 1], the step size of the factors.
      damping: λ ≥ 0.
      momentum: α₁, heavy-ball momentum in [0, 1). None keeps no momentum state, and `momentum_of` and `nesterov` say
        nothing then.
      momentum_of: what v averages: "directions", as published, each by the factors of its own step; or "gradients",
        whose average the present factors apply to, and then nothing in v is by factors of long ago.
      nesterov: whether Nesterov's momentum takes the place of v, as in `optax.trace`.
      weight_decay: κ ≥ 0, added to the direction, before its momentum if it has one. None adds nothing and needs no
        parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      update_every: T ≥ 1: the factors are refreshed at every T-th update; or a callable, see `scale_by_sirf_shampoo`.
      layout: how parameters become blocks. The structures may be dense and diagonal.
      accumulator_dtype: floating-point dtype of v; by default each parameter's own, or for momentum of gradients the
        widest of those whose blocks have one shape.
      block_axes: mesh axes over which stacks of blocks are divided, see `scale_by_sirf_shampoo`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer.

    Raises:
      ValueError: see `scale_by_rf_shampoo`.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not real floating
        point.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.rf_shampoo(0.1, damping=0.1, batch_size=1)
      >>> x = jnp.zeros((2, 3))
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    average = (momentum, momentum_of, nesterov, accumulator_dtype)
    preconditioner = scale_by_rf_shampoo(
        preconditioner_lr,
        damping,
        batch_size=batch_size,
        **_of_gradients(*average),
        update_every=update_every,
        layout=layout,
        block_axes=block_axes,
        precision=precision,
    )
    return optax.chain(preconditioner, *descent(learning_rate, weight_decay, mask, _of_directions(*average)))


def _of_gradients(
    momentum: ArrayLike | None, momentum_of: MomentumOf, nesterov: bool, accumulator_dtype: DTypeLike | None
) -> dict[str, Any]:
    """Returns what the preconditioner averages, if it does."""
    validate.require_choice("momentum_of", momentum_of, ("directions", "gradients"))
    if momentum is None or momentum_of == "directions":
        return {}
    return {"momentum": momentum, "nesterov": nesterov, "accumulator_dtype": accumulator_dtype}


def _of_directions(
    momentum: ArrayLike | None, momentum_of: MomentumOf, nesterov: bool, accumulator_dtype: DTypeLike | None
) -> optax.GradientTransformation | None:
    """Returns what averages directions, or None."""
    if momentum is None or momentum_of == "gradients":
        return None
    return heavy_ball(momentum, nesterov=nesterov, accumulator_dtype=accumulator_dtype)

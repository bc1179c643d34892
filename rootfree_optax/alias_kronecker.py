"""Whole Kronecker optimizers: one `optax.chain` each."""

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax.chaining import MaskOrFn, descent
from rootfree_optax.hyperparameters import UpdateEvery
from rootfree_optax.kronecker import InitialScale, Refresh, scale_by_sirf_shampoo
from rootfree_optax.kronecker_inverse import scale_by_rf_shampoo
from rootfree_optax.layout import Layout
from rootfree_optax.layout.rules import DTypeRule
from rootfree_optax.sharded_plan import BlockAxes


def sirf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preconditioner_lr: optax.ScalarOrSchedule = 0.05,
    damping: optax.ScalarOrSchedule = 1e-4,
    momentum: ArrayLike | None = 0.9,
    riemannian_momentum: ArrayLike | None = 0.5,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    update_every: UpdateEvery = 1,
    staggered: bool = False,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    preconditioner_dtype: DTypeRule = None,
    refresh: Refresh = "published",
    initial_scale: InitialScale = 1.0,
    cache_products: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    block_axes: BlockAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SIRF-Shampoo: structured Shampoo without inverses and without the square root.

        v ← momentum·v + G ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ + κθ
        θ ← θ − learning_rate·v

    See `scale_by_sirf_shampoo` for the factors K.

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      preconditioner_lr: β₂ ≥ 0, the step size of the factors.
      damping: λ ≥ 0.
      momentum: α₁, heavy-ball momentum in [0, 1). None keeps no momentum state.
      riemannian_momentum: α₂, in [0, 1), the factors' momentum. None or 0 keeps no state for it.
      weight_decay: κ ≥ 0, added to the direction before momentum. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      update_every: T ≥ 1: the factors are refreshed at every T-th update; or a callable, see `scale_by_sirf_shampoo`.
      staggered: whether every update refreshes a T-th of the blocks, in turn, so that none takes long.
      layout: how parameters become blocks, and the structure of their factors.
      preconditioner_dtype: floating-point dtype of the factors, see `scale_by_sirf_shampoo`.
      refresh: "published", or "exact" (with `riemannian_momentum=None`), see `scale_by_sirf_shampoo`.
      initial_scale: the curvature before the first step, > 0, or "first_gradient", see `scale_by_sirf_shampoo`.
      cache_products: whether K Kᵀ is kept in the state: steps without refresh take half the products.
      accumulator_dtype: floating-point dtype of v; by default each parameter's own.
      block_axes: mesh axes over which stacks of blocks are divided, see `scale_by_sirf_shampoo`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer. Print `layout.plan(params)` to see what its state will hold and its steps cost.

    Raises:
      ValueError: see `scale_by_sirf_shampoo`.
      TypeError: at `init` for parameters that are not real floating point.

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
    return optax.chain(
        scale_by_sirf_shampoo(
            preconditioner_lr,
            damping,
            riemannian_momentum,
            batch_size=batch_size,
            update_every=update_every,
            staggered=staggered,
            layout=layout,
            preconditioner_dtype=preconditioner_dtype,
            refresh=refresh,
            initial_scale=initial_scale,
            cache_products=cache_products,
            block_axes=block_axes,
            precision=precision,
        ),
        *descent(learning_rate, weight_decay, mask, momentum, accumulator_dtype),
    )


def rf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preconditioner_lr: optax.ScalarOrSchedule = 0.05,
    damping: optax.ScalarOrSchedule = 1e-4,
    momentum: ArrayLike | None = 0.9,
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
        θ ← θ − learning_rate·v

    See `scale_by_rf_shampoo` for the factors S. For comparison and small problems; `sirf_shampoo` is the fast one.

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      preconditioner_lr: β₂, in [0, 1], the step size of the factors.
      damping: λ ≥ 0.
      momentum: α₁, heavy-ball momentum in [0, 1). None keeps no momentum state.
      weight_decay: κ ≥ 0, added to the direction before momentum. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      update_every: T ≥ 1: the factors are refreshed at every T-th update; or a callable, see `scale_by_sirf_shampoo`.
      layout: how parameters become blocks. The structures may be dense and diagonal.
      accumulator_dtype: floating-point dtype of v; by default each parameter's own.
      block_axes: mesh axes over which stacks of blocks are divided, see `scale_by_sirf_shampoo`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer.

    Raises:
      ValueError: see `scale_by_rf_shampoo`.
      TypeError: at `init` for parameters that are not real floating point.

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
    return optax.chain(
        scale_by_rf_shampoo(
            preconditioner_lr,
            damping,
            batch_size=batch_size,
            update_every=update_every,
            layout=layout,
            block_axes=block_axes,
            precision=precision,
        ),
        *descent(learning_rate, weight_decay, mask, momentum, accumulator_dtype),
    )

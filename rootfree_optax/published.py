"""The paper to the letter: its updates, start, clip, heavy ball, coupled weight decay and absolute damping.

For comparison, and for whoever reproduces Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A
Second-Order Perspective (ICML 2024, https://arxiv.org/abs/2402.03496). These optimizers follow the official code to
rounding: see the recorded trajectories in the tests. `batch_size`, the number of terms that the loss averages, is
required, at construction or at each update.
"""

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.rf import CholeskyInverse
from rootfree_optax._src.blocks.sirf import PublishedRefresh
from rootfree_optax._src.common import validate
from rootfree_optax._src.common.schedules import RefreshEvery
from rootfree_optax._src.layout import Layout
from rootfree_optax._src.mesh.stacks_on_mesh import MeshAxes
from rootfree_optax._src.optimizers.links import MaskOrFn, descend, heavy_ball
from rootfree_optax._src.transforms.kronecker import scale_by_kronecker
from rootfree_optax._src.transforms.published import scale_by_rf_adam, scale_by_rf_rms

# Every parameter has factors, over whole axes, as in the official code.
_WHOLE = Layout(diagonal=None, block_size=None, merge_dims=None)

__all__ = [
    "rf_adamw",
    "rf_rmsprop",
    "rf_shampoo",
    "scale_by_rf_adam",
    "scale_by_rf_rms",
    "scale_by_rf_shampoo",
    "scale_by_sirf_shampoo",
    "sirf_shampoo",
]


def rf_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: optax.ScalarOrSchedule = 0.8,
    damping: optax.ScalarOrSchedule = 5e-4,
    momentum: ArrayLike | None = 0.9,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    initial_scale: ArrayLike = 1.0,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-RMSProp as published: RMSProp without the square root.

        s ← decay·s + (1 − decay)·B·g²
        v ← momentum·v + g / (s + λ) + κθ
        θ ← θ − learning_rate·v

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      decay: 1 − β₂, in [0, 1).
      damping: λ ≥ 0.
      momentum: α₁, heavy-ball momentum in [0, 1). None keeps no momentum state.
      weight_decay: κ ≥ 0, added to the direction before momentum. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      initial_scale: s before the first step, ≥ 0.
      mu_dtype: floating-point dtype of v; by default each parameter's own.
      nu_dtype: floating-point dtype of s; by default each parameter's own.

    Returns:
      The optimizer. The state is as large as the parameters, twice with momentum.

    Raises:
      ValueError: at construction for a Python number out of range; at the first `update` without any batch size.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not floating point.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.published.rf_rmsprop(0.5, damping=0.1, momentum=0.5, batch_size=1)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al. 2024, Algorithm "RF-RMSProp".
    """
    return optax.chain(
        scale_by_rf_rms(decay, damping, batch_size=batch_size, initial_scale=initial_scale, nu_dtype=nu_dtype),
        *descend(learning_rate, weight_decay, mask, heavy_ball(momentum, mu_dtype=mu_dtype)),
    )


def rf_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.4,
    b2: optax.ScalarOrSchedule = 0.9,
    damping: optax.ScalarOrSchedule = 1e-6,
    weight_decay: optax.ScalarOrSchedule | None = 1e-4,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    initial_scale: ArrayLike = 1.0,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-AdamW as published: AdamW without the square root.

        m ← b1·m + (1 − b1)·g        s ← b2·s + (1 − b2)·B·g²
        θ ← θ − learning_rate·(m / (s + λ) + κθ)

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      b1: decay of the gradient's average m, in [0, 1).
      b2: 1 − β₂, decay of the curvature's average s, in [0, 1).
      damping: λ ≥ 0.
      weight_decay: κ ≥ 0, decoupled from m and s. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      initial_scale: s before the first step, ≥ 0.
      bias_correction: whether m and s are corrected for their start (see `scale_by_rf_adam`).
      mu_dtype: floating-point dtype of m; by default each parameter's own.
      nu_dtype: floating-point dtype of s; by default each parameter's own.

    Returns:
      The optimizer. The state is twice as large as the parameters.

    Raises:
      ValueError: at construction for a Python number out of range; at the first `update` without any batch size.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not floating point.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.published.rf_adamw(0.5, damping=0.1, weight_decay=None, batch_size=1)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al. 2024, Algorithm "RF-AdamW".
    """
    return optax.chain(
        scale_by_rf_adam(
            b1,
            b2,
            damping,
            batch_size=batch_size,
            initial_scale=initial_scale,
            bias_correction=bias_correction,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        *descend(learning_rate, weight_decay, mask),
    )


def scale_by_sirf_shampoo(
    preconditioner_lr: optax.ScalarOrSchedule = 0.2,
    damping: optax.ScalarOrSchedule = 2e-4,
    riemannian_momentum: ArrayLike | None = 0.5,
    *,
    batch_size: ArrayLike | None = None,
    initial_scale: ArrayLike = 1.0,
    refresh_every: RefreshEvery = 1,
    cache_preconditioner: bool = False,
    layout: Layout = _WHOLE,
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients by structured Kronecker factors, without inverses or roots, as published.

        stepₙ = Π̂( X₍ₙ₎X₍ₙ₎ᵀ + λ·Π_{j≠n} Tr(KⱼᵀKⱼ)·KₙᵀKₙ ) / (2 Π_{j≠n} dⱼ) − I/2,   X = √B·G ×₁ K₁ᵀ … ×_N K_Nᵀ
        mₙ ← α₂ mₙ + (1 − α₂) stepₙ,   Kₙ ← Kₙ − β₂ / max(1, ‖mₙ‖_F) · Kₙ mₙ
        direction = G ×₁ K₁K₁ᵀ … ×_N K_NK_Nᵀ

    Args:
      preconditioner_lr: β₂ ≥ 0, the step size of the factors. A number, a traced scalar or a schedule.
      damping: λ ≥ 0. A number, a traced scalar or a schedule.
      riemannian_momentum: α₂, in [0, 1). A number or a traced scalar; None or 0 keeps no momentum state.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      initial_scale: s > 0, the curvature before the first step: the factors of N axes start at s^(−1/2N)·I.
      refresh_every: T ≥ 1, `rf.staggered(T)`, `rf.growing(T)` or a callable, see `rf.scale_by_kronecker`.
      cache_preconditioner: whether K Kᵀ is kept in the state, as large as K, which halves the products of a step
        without refresh. For structures that are closed under transposition.
      layout: how parameters become blocks, and the structure and dtype of their factors. By default every parameter has
        factors over whole axes. All structures are admitted.
      mesh_axes: mesh axes over which stacks are divided, see `rf.scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature`, see
      `rf.scale_by_kronecker`.

    Raises:
      ValueError: see `rf.scale_by_kronecker`.
      TypeError: see `rf.scale_by_kronecker`.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.published.scale_by_sirf_shampoo(0.5, 0.0, None, batch_size=1)
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> state = tx.init(params)
      >>> direction, state = tx.update({"kernel": jnp.eye(2, 3)}, state)
      >>> k1, k2 = rf.factors(state, params)["kernel"]
      >>> print(f"{k1[0, 0]:.3f}")
      1.167

    References:
      Lin et al. 2024, inverse-free Shampoo; the official code is the package `sirfshampoo`.
    """
    validate.require_number("preconditioner_lr", preconditioner_lr, validate.NON_NEGATIVE)
    validate.require_number(
        "riemannian_momentum", riemannian_momentum, validate.FRACTION, schedule=False, optional=True
    )
    validate.require_number("initial_scale", initial_scale, validate.POSITIVE, schedule=False)
    kept = None if validate.is_zero(riemannian_momentum) else riemannian_momentum
    return scale_by_kronecker(
        PublishedRefresh(kept, initial_scale, cache_preconditioner, precision),
        weight=preconditioner_lr,
        damping=damping,
        batch_size=batch_size,
        refresh_every=refresh_every,
        layout=layout,
        mesh_axes=mesh_axes,
    )


def sirf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preconditioner_lr: optax.ScalarOrSchedule = 0.2,
    damping: optax.ScalarOrSchedule = 2e-4,
    momentum: ArrayLike | None = 0.9,
    riemannian_momentum: ArrayLike | None = 0.5,
    initial_scale: ArrayLike = 1.0,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    refresh_every: RefreshEvery = 1,
    cache_preconditioner: bool = False,
    layout: Layout = _WHOLE,
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SIRF-Shampoo as published.

        v ← momentum·v + D + κθ
        θ ← θ − learning_rate·v

    with the direction D of `scale_by_sirf_shampoo`.

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      preconditioner_lr: β₂ ≥ 0, the step size of the factors.
      damping: λ ≥ 0.
      momentum: α₁, heavy-ball momentum of the directions, in [0, 1). None keeps no momentum state.
      riemannian_momentum: α₂, in [0, 1), the factors' momentum. None or 0 keeps no state.
      initial_scale: s > 0, the curvature before the first step.
      weight_decay: κ ≥ 0, added to the direction before momentum. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      mu_dtype: floating-point dtype of v; by default each parameter's own.
      refresh_every: T ≥ 1, `rf.staggered(T)`, `rf.growing(T)` or a callable, see `rf.scale_by_kronecker`.
      cache_preconditioner: whether K Kᵀ is kept in the state.
      layout: how parameters become blocks, and the structure and dtype of their factors.
      mesh_axes: mesh axes over which stacks of blocks are divided.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer.

    Raises:
      ValueError: see `rf.scale_by_kronecker`.
      TypeError: see `rf.scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.published.sirf_shampoo(0.05, damping=0.1, batch_size=1)
      >>> x = jnp.zeros((2, 3))
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al. 2024, inverse-free Shampoo; the official code is the package `sirfshampoo`.
    """
    return optax.chain(
        scale_by_sirf_shampoo(
            preconditioner_lr,
            damping,
            riemannian_momentum,
            batch_size=batch_size,
            initial_scale=initial_scale,
            refresh_every=refresh_every,
            cache_preconditioner=cache_preconditioner,
            layout=layout,
            mesh_axes=mesh_axes,
            precision=precision,
        ),
        *descend(learning_rate, weight_decay, mask, heavy_ball(momentum, mu_dtype=mu_dtype)),
    )


def scale_by_rf_shampoo(
    preconditioner_lr: optax.ScalarOrSchedule = 0.2,
    damping: optax.ScalarOrSchedule = 2e-4,
    *,
    batch_size: ArrayLike | None = None,
    refresh_every: RefreshEvery = 1,
    layout: Layout = _WHOLE,
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients by the inverses of Kronecker factors, without roots (RF-Shampoo).

        Hₙ = ( B · G₍ₙ₎ (⊗_{j≠n} Sⱼ⁻¹) G₍ₙ₎ᵀ + λ·Π_{j≠n} Tr(Sⱼ⁻¹)·I ) / Π_{j≠n} dⱼ
        Sₙ ← (1 − β₂) Sₙ + β₂ Hₙ            direction = G ×₁ S₁⁻¹ … ×_N S_N⁻¹

    By Cholesky solves in at least float32: for comparison and for small problems.

    Args:
      preconditioner_lr: β₂, in [0, 1]. A number, a traced scalar or a schedule.
      damping: λ ≥ 0. A number, a traced scalar or a schedule.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      refresh_every: T ≥ 1, `rf.staggered(T)`, `rf.growing(T)` or a callable, see `rf.scale_by_kronecker`.
      layout: how parameters become blocks. The structures may be dense and diagonal.
      mesh_axes: mesh axes over which stacks are divided, see `rf.scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature`, see
      `rf.scale_by_kronecker`.

    Raises:
      ValueError: see `rf.scale_by_kronecker`.
      TypeError: see `rf.scale_by_kronecker`.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.published.scale_by_rf_shampoo(preconditioner_lr=0.5, damping=0.0, batch_size=1)
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> direction, state = tx.update({"kernel": jnp.eye(2, 3)}, tx.init(params))
      >>> s1, s2 = rf.factors(state, params)["kernel"]
      >>> print(f"{s1[0, 0]:.3f}")
      0.667

    References:
      Lin et al. 2024, Algorithm "RF-Shampoo".
    """
    validate.require_number("preconditioner_lr", preconditioner_lr, validate.AT_MOST_ONE)
    return scale_by_kronecker(
        CholeskyInverse(precision),
        weight=preconditioner_lr,
        damping=damping,
        batch_size=batch_size,
        refresh_every=refresh_every,
        layout=layout,
        mesh_axes=mesh_axes,
    )


def rf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    preconditioner_lr: optax.ScalarOrSchedule = 0.2,
    damping: optax.ScalarOrSchedule = 2e-4,
    momentum: ArrayLike | None = 0.6,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    refresh_every: RefreshEvery = 1,
    layout: Layout = _WHOLE,
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-Shampoo: Shampoo without the square root, with inverses.

        v ← momentum·v + G ×₁ S₁⁻¹ … ×_N S_N⁻¹ + κθ
        θ ← θ − learning_rate·v

    See `scale_by_rf_shampoo` for the factors S. For comparison and small problems; `sirf_shampoo` is the fast one.

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      preconditioner_lr: β₂, in [0, 1], the weight of the newest curvature.
      damping: λ ≥ 0.
      momentum: α₁, heavy-ball momentum of the directions, in [0, 1). None keeps no momentum state.
      weight_decay: κ ≥ 0, added to the direction before momentum. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      mu_dtype: floating-point dtype of v; by default each parameter's own.
      refresh_every: T ≥ 1, `rf.staggered(T)`, `rf.growing(T)` or a callable, see `rf.scale_by_kronecker`.
      layout: how parameters become blocks. The structures may be dense and diagonal.
      mesh_axes: mesh axes over which stacks of blocks are divided.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer.

    Raises:
      ValueError: see `rf.scale_by_kronecker`.
      TypeError: see `rf.scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.published.rf_shampoo(0.1, damping=0.1, batch_size=1)
      >>> x = jnp.zeros((2, 3))
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al. 2024, Algorithm "RF-Shampoo".
    """
    return optax.chain(
        scale_by_rf_shampoo(
            preconditioner_lr,
            damping,
            batch_size=batch_size,
            refresh_every=refresh_every,
            layout=layout,
            mesh_axes=mesh_axes,
            precision=precision,
        ),
        *descend(learning_rate, weight_decay, mask, heavy_ball(momentum, mu_dtype=mu_dtype)),
    )

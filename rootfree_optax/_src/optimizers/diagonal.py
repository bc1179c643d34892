"""The whole diagonal optimizers: one line in place of AdamW's or RMSProp's."""

import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.common.schedules import StepSize
from rootfree_optax._src.optimizers.links import MaskOrFn, descend, heavy_ball
from rootfree_optax._src.transforms.diagonal import scale_by_rf_adam, scale_by_rf_rms


def rf_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule = 0.95,
    *,
    momentum: ArrayLike | None = 0.9,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-RMSProp: RMSProp without the square root, at the learning rate, schedule and weight decay of AdamW.

        s ← decay·s + (1 − decay)·g²,   d = g / (s + ρ·mean(s)), as long as g / √s
        v ← momentum·v + (1 − momentum)·d
        θ ← θ − learning_rate·(v̂ + weight_decay·θ)

    v̂ is v corrected for its start at zero. See `scale_by_rf_rms` for s. `rf.published.rf_rmsprop` is the paper's form.

    Args:
      learning_rate: a number, a traced scalar or a schedule.
      decay: b₂, in [0, 1), how much of s is kept at each step.
      momentum: decay of the average of directions, in [0, 1). None averages nothing and keeps no state.
      mu_dtype: floating-point dtype of v; by default each parameter's own.
      nu_dtype: floating-point dtype of s; by default each parameter's own, float32 for float16.
      weight_decay: κ ≥ 0, decoupled, as AdamW's.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      damping: ρ ≥ 0, relative to the mean of s over the parameter.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`.
      step_size: "adamw", at the length of AdamW's steps; or "newton", g / (B·(s + ρ·mean(s)) + λ).
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`. A `batch_size=` passed to `update`
        wins.

    Returns:
      The optimizer. The state is as large as the parameters, twice with momentum.

    Raises:
      ValueError: see `scale_by_rf_rms`.
      TypeError: see `scale_by_rf_rms`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.rf_rmsprop(optax.linear_schedule(0.1, 0.0, 200), weight_decay=0.0)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.2f}")
      3.00

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    rescaled = scale_by_rf_rms(
        decay,
        damping=damping,
        absolute_damping=absolute_damping,
        step_size=step_size,
        batch_size=batch_size,
        nu_dtype=nu_dtype,
    )
    average = heavy_ball(momentum, mu_dtype=mu_dtype, average=True)
    return optax.chain(rescaled, average, *descend(learning_rate, weight_decay, mask))


def rf_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: optax.ScalarOrSchedule = 0.95,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-AdamW: AdamW without the square root, at AdamW's learning rate, schedule and weight decay.

        m ← b1·m + (1 − b1)·g        s ← b2·s + (1 − b2)·g²
        d = m̂ / (s + ρ·mean(s)), as long as Adam's m̂ / √s
        θ ← θ − learning_rate·(d + weight_decay·θ)

    There is no ε: the damping keeps s + ρ·mean(s) from zero, at any scale of the loss. See `scale_by_rf_adam`.
    `rf.published.rf_adamw` is the paper's form.

    Args:
      learning_rate: a number, a traced scalar or a schedule: AdamW's.
      b1: decay of the gradient's average m, in [0, 1).
      b2: decay of the curvature's average s, in [0, 1).
      mu_dtype: floating-point dtype of m; by default each parameter's own.
      nu_dtype: floating-point dtype of s; by default each parameter's own, float32 for float16.
      weight_decay: κ ≥ 0, decoupled, as AdamW's.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      damping: ρ ≥ 0, relative to the mean of s over the parameter.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`.
      step_size: "adamw", at the length of AdamW's steps; or "newton", m̂ / (B·(s + ρ·mean(s)) + λ).
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`. A `batch_size=` passed to `update`
        wins.

    Returns:
      The optimizer. The state is twice as large as the parameters.

    Raises:
      ValueError: see `scale_by_rf_adam`.
      TypeError: see `scale_by_rf_adam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> loss = lambda x: jnp.mean((x - 3.0) ** 2)
      >>> tx = rf.rf_adamw(optax.linear_schedule(0.1, 0.0, 200), weight_decay=0.0)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.2f}")
      3.00

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    rescaled = scale_by_rf_adam(
        b1,
        b2,
        damping=damping,
        absolute_damping=absolute_damping,
        step_size=step_size,
        batch_size=batch_size,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    return optax.chain(rescaled, *descend(learning_rate, weight_decay, mask))

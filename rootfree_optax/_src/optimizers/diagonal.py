"""The whole diagonal optimizers."""

import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.optimizers.links import MaskOrFn, descend, heavy_ball
from rootfree_optax._src.transforms.diagonal import scale_by_rf_adam, scale_by_rf_rms


def rf_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule = 0.8,
    *,
    momentum: ArrayLike | None = 0.9,
    damping: optax.ScalarOrSchedule = 5e-4,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-RMSProp: RMSProp without the square root, with decoupled weight decay.

        s ← decay·s + (1 − decay)·B·g²
        v ← momentum·v + g / (s + λ)
        θ ← θ − learning_rate·(v + κθ)

    The step is a damped Newton-like one, so its learning rate is not RMSProp's: g / s scales as one over the gradient
    where g / √s does not scale at all.

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      decay: 1 − β₂, in [0, 1).
      momentum: α₁, heavy-ball momentum in [0, 1). None keeps no momentum state.
      damping: λ ≥ 0.
      weight_decay: κ ≥ 0, decoupled from s and v. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
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
      >>> tx = rf.rf_rmsprop(0.5, damping=0.1, momentum=0.5, batch_size=1)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    return optax.chain(
        scale_by_rf_rms(decay, damping, batch_size=batch_size, nu_dtype=nu_dtype),
        optax.identity() if momentum is None else heavy_ball(momentum, mu_dtype=mu_dtype),
        *descend(learning_rate, weight_decay, mask),
    )


def rf_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.4,
    b2: optax.ScalarOrSchedule = 0.9,
    *,
    damping: optax.ScalarOrSchedule = 1e-6,
    weight_decay: optax.ScalarOrSchedule | None = 1e-4,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RF-AdamW: AdamW without the square root.

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
      >>> tx = rf.rf_adamw(0.5, damping=0.1, weight_decay=None, batch_size=1)
      >>> x = jnp.zeros(4)
      >>> state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.3f}")
      3.000

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    return optax.chain(
        scale_by_rf_adam(b1, b2, damping, batch_size=batch_size, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        *descend(learning_rate, weight_decay, mask),
    )

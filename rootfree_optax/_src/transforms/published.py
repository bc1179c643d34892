"""Root-free diagonal transformations as published: RF-RMSProp's and RF-Adam's rescaling of the gradient."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.diagonal import averaged_direction, first_moment, root_free_direction, second_moment
from rootfree_optax._src.blocks.momentum import total_weight
from rootfree_optax._src.common import schedules, trees, validate
from rootfree_optax._src.numerics.arithmetic import real_dtype
from rootfree_optax._src.transforms.accumulators import fill_like, init_average, update_squares
from rootfree_optax._src.transforms.diagonal import ScaleByRfState
from rootfree_optax._src.transforms.origin import describe_tree, dtype_name, make_origin, nan_unless, require_origin


def scale_by_rf_rms(
    decay: optax.ScalarOrSchedule = 0.8,
    damping: optax.ScalarOrSchedule = 5e-4,
    *,
    batch_size: ArrayLike | None = None,
    initial_scale: ArrayLike = 1.0,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients by a moving average of their squares, without the square root.

        s ← decay·s + (1 − decay)·B·g²        direction = g / (s + λ)

    g is the gradient of a loss that is a mean over B terms; B·g² then estimates the diagonal of the loss's curvature,
    and the direction is a damped Newton-like step, unaffected by a rescaling of the parameters as λ → 0. Complex
    gradients use |g|². All arithmetic is in at least float32.

    A non-finite gradient leaves its entries of s as they were, and shows in the direction, so that
    `optax.apply_if_finite` works. A B·g² that overflows counts as the largest number.

    Args:
      decay: 1 − β₂, in [0, 1): how much of s is kept at each step. A number, a traced scalar or a schedule.
      damping: λ ≥ 0. A number, a traced scalar or a schedule.
      batch_size: B > 0, how many terms the loss averages (the global batch size). A `batch_size=` passed to `update`
        wins; it may change from step to step without recompiling.
      initial_scale: s before the first step, ≥ 0. The default of one matches a preconditioner that starts at the
        identity; zero reproduces RMSProp's start.
      nu_dtype: floating-point dtype of s; by default each parameter's own. A half-precision s is rounded so
        that it follows the moving average even where 1 − decay is below its resolution.

    Returns:
      A transformation whose `update` takes two extra arguments: `batch_size`, and `curvature`, a tree like the
      gradients (or with one more leading axis of samples, averaged over) that takes g's place in B·g².

    Raises:
      ValueError: at construction for a Python number out of range; at the first `update` without any batch size, or
        for gradients unlike the parameters.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not floating point.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.published.scale_by_rf_rms(decay=0.5, damping=0.0, batch_size=4)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> direction, state = tx.update(jnp.array([1.0, 2.0]), state)
      >>> print(state.nu, direction)
      [2.5 8.5] [0.4        0.23529412]

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    validate.require_number("decay", decay, validate.FRACTION)
    options = {"transformation": "published.scale_by_rf_rms", "nu_dtype": dtype_name(nu_dtype)}
    return _scale_by_rf(options, None, decay, damping, batch_size, initial_scale, nu_dtype=nu_dtype)


def scale_by_rf_adam(
    b1: ArrayLike = 0.4,
    b2: optax.ScalarOrSchedule = 0.9,
    damping: optax.ScalarOrSchedule = 1e-6,
    *,
    batch_size: ArrayLike | None = None,
    initial_scale: ArrayLike = 1.0,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales the gradient's moving average by a moving average of its squares, without the square root.

        m ← b1·m + (1 − b1)·g        s ← b2·s + (1 − b2)·B·g²        direction = m / (s + λ)

    See `scale_by_rf_rms` for B, the arithmetic, complex and non-finite gradients. A non-finite gradient shows in one
    direction, and leaves its entries of m and s as they were.

    Args:
      b1: decay of m, in [0, 1). A number or a traced scalar.
      b2: 1 − β₂, decay of s, in [0, 1). A number, a traced scalar or a schedule.
      damping: λ ≥ 0. A number, a traced scalar or a schedule.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      initial_scale: s before the first step, ≥ 0.
      bias_correction: whether to divide m by 1 − b1ᵗ and s by 1 − b2ᵗ, for an `initial_scale` of 0. Off by default: s
        starts at one, so unlike Adam's it is not biased towards zero. The correction of s assumes a constant b2.
      mu_dtype: floating-point dtype of m; by default each parameter's own.
      nu_dtype: floating-point dtype of s; by default each parameter's own.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature` (see `scale_by_rf_rms`).

    Raises:
      ValueError: at construction for a Python number out of range, or for bias correction with a schedule for b2; at
        the first `update` without any batch size, or for gradients unlike the parameters.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not floating point.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.published.scale_by_rf_adam(b1=0.5, b2=0.5, damping=0.0, batch_size=4)
      >>> params = jnp.zeros(2)
      >>> direction, state = tx.update(jnp.array([1.0, 2.0]), tx.init(params))
      >>> print(state.mu, state.nu, direction)
      [0.5 1. ] [2.5 8.5] [0.2        0.11764706]

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    validate.require_number("b1", b1, validate.FRACTION, schedule=False)
    validate.require_number("b2", b2, validate.FRACTION)
    validate.require_choice("bias_correction", bias_correction, (False, True))
    if bias_correction and callable(b2):
        raise ValueError("bias_correction assumes a constant b2, got a schedule. Pass bias_correction=False.")
    options = {
        "transformation": "published.scale_by_rf_adam",
        "bias_correction": bias_correction,
        "mu_dtype": dtype_name(mu_dtype),
        "nu_dtype": dtype_name(nu_dtype),
    }
    return _scale_by_rf(
        options, b1, b2, damping, batch_size, initial_scale, bias_correction, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )


def _scale_by_rf(
    options: Mapping[str, Any],
    b1: ArrayLike | None,
    b2: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule,
    at_construction: ArrayLike | None,
    initial_scale: ArrayLike,
    bias_correction: bool = False,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the rescaling of gradients, or of their average with a decay of b1."""
    validate.require_number("damping", damping, validate.NON_NEGATIVE)
    validate.require_number("initial_scale", initial_scale, validate.NON_NEGATIVE, schedule=False)
    schedules.require_batch_size(at_construction)
    validate.require_floating_dtype("mu_dtype", mu_dtype)
    validate.require_floating_dtype("nu_dtype", nu_dtype)

    def init(params: optax.Params) -> ScaleByRfState:
        trees.require_inexact(params)
        mu = None if b1 is None else init_average(params, mu_dtype)
        dtype_of = lambda param: real_dtype(jnp.result_type(param)) if nu_dtype is None else nu_dtype
        nu = jax.tree.map(lambda param: fill_like(param, initial_scale, dtype_of(param)), params)
        return ScaleByRfState(jnp.zeros([], jnp.int32), mu, nu, make_origin(describe_tree(options, nu), params))

    def update(
        updates: optax.Updates,
        state: ScaleByRfState,
        params: optax.Params | None = None,
        *,
        batch_size: ArrayLike | None = None,
        curvature: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByRfState]:
        del params, extra_args
        batch_size = schedules.resolve_batch_size(batch_size, at_construction)
        decay = schedules.value_at("decay" if b1 is None else "b2", b2, state.count)
        average = functools.partial(second_moment, decay=decay, batch_size=batch_size, count=state.count)
        nu = update_squares(average, state.nu, updates, curvature)
        is_own = require_origin(state.origin, describe_tree(options, state.nu))
        count = optax.safe_increment(state.count)
        damping_now = nan_unless(is_own, schedules.value_at("damping", damping, state.count))
        if b1 is None:
            step = functools.partial(root_free_direction, damping=damping_now)
            return trees.map_gradients(step, updates, nu), ScaleByRfState(count, None, nu, state.origin)
        averages, mu = trees.map_steps(lambda g, m: first_moment(m, g, decay=b1), updates, state.mu)
        step = functools.partial(
            averaged_direction,
            damping=damping_now,
            m_weight=total_weight(b1, count) if bias_correction else 1.0,
            s_weight=total_weight(b2, count) if bias_correction else 1.0,
        )
        return trees.map_gradients(step, updates, averages, nu), ScaleByRfState(count, mu, nu, state.origin)

    return optax.GradientTransformationExtraArgs(init, update)

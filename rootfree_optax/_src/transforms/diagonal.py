"""Scale-free root-free diagonal transformations: RF-RMSProp's and RF-Adam's rescaling of the gradient."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.diagonal import (
    LONGEST_OF_AVERAGES,
    LONGEST_OF_GRADIENTS,
    average_square,
    first_moment,
    limit_to_squares,
    newton_step,
    root_free_step,
)
from rootfree_optax._src.blocks.momentum import total_weight
from rootfree_optax._src.common import schedules, trees, validate
from rootfree_optax._src.common.schedules import StepSize
from rootfree_optax._src.numerics.arithmetic import upcast
from rootfree_optax._src.transforms.accumulators import init_average, init_squares, update_squares
from rootfree_optax._src.transforms.origin import describe_tree, dtype_name, make_origin, nan_unless, require_origin


class ScaleByRfState(NamedTuple):
    """State of `scale_by_rf_rms` and of `scale_by_rf_adam`.

    Attributes:
      count: how many updates there have been.
      mu: the gradient's average m, a tree like the parameters; None without.
      nu: the accumulator s, a tree like the parameters.
      origin: what the state belongs to, see `rf.check`.
    """

    count: jax.Array  # type: ignore[assignment]  # Optax names it so, and tuples have a method of that name
    mu: Any
    nu: Any
    origin: Any


def scale_by_rf_rms(
    decay: optax.ScalarOrSchedule = 0.95,
    *,
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients by a moving average of their squares, without the square root.

        s ← decay·s + (1 − decay)·g²        direction = g / (s + ρ·mean(s)), as long as g / √s

    The mean is over the parameter. With `step_size="newton"` the direction is g / (B·(s + ρ·mean(s)) + λ), a damped
    Newton-like step for a loss that is a mean over B terms. Complex gradients use |g|². All arithmetic is in at least
    float32.

    s is an average that starts right. An entry whose gradient is zero or not finite keeps its s; the direction shows a
    non-finite gradient, so that `optax.apply_if_finite` works. Finite entries of g count as at most 2⁵⁰ in magnitude.

    Args:
      decay: b₂, in [0, 1): how much of s is kept at each step. A number, a traced scalar or a schedule.
      damping: ρ ≥ 0, relative to the mean of s over the parameter. A number, a traced scalar or a schedule.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`. A number, a traced scalar or a schedule.
      step_size: "adamw", so that AdamW's learning rate serves, or "newton".
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`. A `batch_size=` passed to `update`
        wins; it may change from step to step without recompiling.
      nu_dtype: floating-point dtype of s; by default each parameter's own, float32 for float16. A half-precision s is
        rounded so that it follows the moving average even where 1 − decay is below its resolution.

    Returns:
      A transformation whose `update` takes two extra arguments: `batch_size`, and `curvature`, a tree like the
      gradients (or with one more leading axis of samples, averaged over) that takes g's place in g².

    Raises:
      ValueError: at construction for a Python number out of range, or for `absolute_damping` or `batch_size` where they
        have no effect; with "newton" at the first `update` without any batch size; for gradients unlike the parameters.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not floating point.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.scale_by_rf_rms(damping=0.0)
      >>> params = jnp.zeros(2)
      >>> direction, state = tx.update(jnp.array([1.0, 2.0]), tx.init(params))
      >>> print(state.nu, [f"{d:.3f}" for d in direction])
      [1. 4.] ['1.265', '0.632']

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    validate.require_number("decay", decay, validate.FRACTION)
    options = {"transformation": "scale_by_rf_rms", "nu_dtype": dtype_name(nu_dtype)}
    return _scale_by_rf(
        options, None, decay, damping, absolute_damping, step_size, batch_size, mu_dtype=None, nu_dtype=nu_dtype
    )


def scale_by_rf_adam(
    b1: ArrayLike = 0.9,
    b2: optax.ScalarOrSchedule = 0.95,
    *,
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales the gradient's moving average by a moving average of its squares, without the square root.

        m ← b1·m + (1 − b1)·g        s ← b2·s + (1 − b2)·g²
        direction = m̂ / (s + ρ·mean(s)), as long as Adam's m̂ / √s

    m̂ is m corrected for its start at zero. See `scale_by_rf_rms` for the mean, for `step_size="newton"`, the
    arithmetic, complex and non-finite gradients, and gradients of zero. A non-finite gradient shows in one direction,
    and leaves its entries of m as they were.

    Args:
      b1: decay of m, in [0, 1). A number or a traced scalar.
      b2: decay of s, in [0, 1). A number, a traced scalar or a schedule.
      damping: ρ ≥ 0, relative to the mean of s over the parameter. A number, a traced scalar or a schedule.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`. A number, a traced scalar or a schedule.
      step_size: "adamw", so that AdamW's learning rate serves, or "newton".
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`. A `batch_size=` passed to `update`
        wins.
      mu_dtype: floating-point dtype of m; by default each parameter's own.
      nu_dtype: floating-point dtype of s; by default each parameter's own, float32 for float16.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature` (see `scale_by_rf_rms`).

    Raises:
      ValueError: see `scale_by_rf_rms`.
      TypeError: see `scale_by_rf_rms`.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.scale_by_rf_adam(damping=0.0)
      >>> params = jnp.zeros(2)
      >>> direction, state = tx.update(jnp.array([1.0, 2.0]), tx.init(params))
      >>> print([f"{d:.3f}" for d in direction])
      ['1.265', '0.632']

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    validate.require_number("b1", b1, validate.FRACTION, schedule=False)
    validate.require_number("b2", b2, validate.FRACTION)
    dtypes = {"mu_dtype": dtype_name(mu_dtype), "nu_dtype": dtype_name(nu_dtype)}
    options = {"transformation": "scale_by_rf_adam", **dtypes}
    return _scale_by_rf(
        options, b1, b2, damping, absolute_damping, step_size, batch_size, mu_dtype=mu_dtype, nu_dtype=nu_dtype
    )


def _scale_by_rf(
    options: Mapping[str, Any],
    b1: ArrayLike | None,
    b2: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule,
    absolute_damping: optax.ScalarOrSchedule,
    step_size: StepSize,
    at_construction: ArrayLike | None,
    *,
    mu_dtype: DTypeLike | None,
    nu_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the rescaling of gradients, or of their average with a decay of b1."""
    validate.require_number("damping", damping, validate.NON_NEGATIVE)
    schedules.require_step_size(step_size, absolute_damping, at_construction)
    validate.require_floating_dtype("mu_dtype", mu_dtype)
    validate.require_floating_dtype("nu_dtype", nu_dtype)

    def init(params: optax.Params) -> ScaleByRfState:
        trees.require_inexact(params)
        mu = None if b1 is None else init_average(params, mu_dtype)
        nu = init_squares(params, nu_dtype)
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
        count = optax.safe_increment(state.count)
        is_own = require_origin(state.origin, describe_tree(options, state.nu))
        name = "decay" if b1 is None else "b2"
        average = functools.partial(_average_square, 1 - schedules.value_at(name, b2, state.count), count)
        nu = update_squares(average, state.nu, updates, curvature)
        rho = nan_unless(is_own, schedules.value_at("damping", damping, state.count))
        longest = LONGEST_OF_GRADIENTS if b1 is None else LONGEST_OF_AVERAGES
        step = _step(step_size, rho, longest, absolute_damping, batch_size, at_construction, state.count)
        if b1 is None:
            direction, mu = trees.map_gradients(functools.partial(_rescale, step), updates, nu), None
        else:
            rescale = functools.partial(_rescale_average, step, b1, total_weight(b1, count))
            direction, mu, nu = trees.map_steps(rescale, updates, state.mu, nu)
        return direction, ScaleByRfState(count, mu, nu, state.origin)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    step_size: StepSize,
    rho: ArrayLike,
    longest: float,
    absolute_damping: optax.ScalarOrSchedule,
    batch_size: ArrayLike | None,
    at_construction: ArrayLike | None,
    count: jax.Array,
) -> Any:
    """Returns the function of an average and an accumulator that makes a step."""
    if step_size == "adamw":
        return jax.tree_util.Partial(root_free_step, damping=rho, longest=longest)
    return jax.tree_util.Partial(
        newton_step,
        damping=rho,
        absolute_damping=schedules.value_at("absolute_damping", absolute_damping, count),
        batch_size=schedules.resolve_batch_size(batch_size, at_construction),
    )


# Compiled functions of one array, so that arrays of one shape are traced once, and are in the program once.


@jax.jit
def _average_square(weight: ArrayLike, count: jax.Array, s: jax.Array, curvature: jax.Array) -> jax.Array:
    return average_square(s, limit_to_squares(curvature), weight=weight, count=count)


@jax.jit
def _rescale(step: Any, gradient: jax.Array, s: jax.Array) -> jax.Array:
    return step(upcast(limit_to_squares(gradient)), s).astype(gradient.dtype)


@jax.jit
def _rescale_average(
    step: Any, b1: ArrayLike, b1_weight: jax.Array, gradient: jax.Array, m: jax.Array, s: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    average, m = first_moment(m, limit_to_squares(gradient), decay=b1)
    return step(average / b1_weight.astype(average.dtype), s).astype(gradient.dtype), m, s

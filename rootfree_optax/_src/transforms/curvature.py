"""The three scale-free Kronecker transformations: one curvature, three steps from it."""

from fractions import Fraction
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.curvature import CurvatureRule, RootFree, Spectral, Whitening
from rootfree_optax._src.common import schedules, validate
from rootfree_optax._src.common.schedules import Interval, RefreshEvery, StepSize
from rootfree_optax._src.layout import Layout
from rootfree_optax._src.mesh.stacks_on_mesh import MeshAxes
from rootfree_optax._src.transforms.kronecker import scale_by_kronecker


def scale_by_sirf_muon(
    momentum: ArrayLike | None = 0.95,
    statistics_decay: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    mu_dtype: DTypeLike | None = None,
    power: float | Fraction = Fraction(1, 4),  # a number that optax.inject_hyperparams leaves alone
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    refresh_every: RefreshEvery = 10,
    statistics_every: Interval = 1,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    layout: Layout = Layout(diagonal=None),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalizes the gradients' average in the metric of the curvature's Kronecker factors (spectral step).

        Sₙ ← b₂ Sₙ + (1 − b₂) G₍ₙ₎ (⊗_{j≠n} S̃ⱼ⁻¹) G₍ₙ₎ᵀ / Π_{j≠n} dⱼ,   S̃ₙ = Sₙ + (ρ·tr(Sₙ)/dₙ)·I
        D = msign(M ×ₙ S̃ₙ^(−q)) ×ₙ S̃ₙ^(−q)

    In the metric's coordinates all singular values of the step are equal. With AdamW's length D has an rms of 0.4 in
    noise, and of up to one while gradients agree with the momentum before them.

    Args:
      momentum: decay of the gradients' average M, in [0, 1). A number or a traced scalar; None averages nothing.
      statistics_decay: b₂, in (0, 1). A number, a traced scalar or a schedule.
      nesterov: whether M is Nesterov's average; ignored without momentum.
      mu_dtype: floating-point dtype of M, see `scale_by_kronecker`.
      power: q, of the curvature on both sides of msign: 1/2, 1/4 or 1/8, static. 1/2 is the full metric; Muon is the
        limit of 0, and of strong damping. Under `optax.inject_hyperparams` write a `Fraction`: it traces floats.
      damping: ρ ≥ 0. A number, a traced scalar or a schedule.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`: added to B·S.
      refresh_every: T ≥ 1, `staggered(T)`, `growing(T)` or a callable, see `scale_by_kronecker`.
      statistics_every: c ≥ 1: the statistics take in every c-th gradient; or a callable. Each costs two products an
        axis.
      step_size: "adamw", at the length of AdamW's steps; or "newton", D itself for the curvature of the loss.
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`.
      layout: how parameters become blocks, and the structure and dtype of their factors. By default every parameter has
        factors, vectors diagonal ones.
      mesh_axes: mesh axes over which stacks are divided, see `scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.
      rest: what updates the parameters without factors, if the layout leaves any out.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature`, see `scale_by_kronecker`.

    Raises:
      ValueError: at construction for a Python number out of range or without effect; see `scale_by_kronecker`.
      TypeError: see `scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.scale_by_sirf_muon()
      >>> params = jnp.zeros((4, 3))
      >>> direction, state = tx.update(jax.random.normal(jax.random.key(0), (4, 3)), tx.init(params))
      >>> print(f"{jnp.sqrt(jnp.mean(direction**2)):.3f}")
      0.400

    References:
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon; FISMO (q = 1/2), https://arxiv.org/abs/2601.21750;
      Mousse (q = 1/8, with Shampoo's statistics), https://arxiv.org/abs/2603.09697
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    if isinstance(power, jax.Array) or power not in (1 / 2, 1 / 4, 1 / 8):
        raise ValueError(
            f"power must be 1/2, 1/4 or 1/8, as a Python number, got {power!r}. "
            "Under optax.inject_hyperparams, which traces floats, pass a fractions.Fraction or static_args='power'."
        )
    return _scale_by_curvature(
        Spectral(float(power), step_size=step_size, precision=precision),
        momentum,
        statistics_decay,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        damping=damping,
        absolute_damping=absolute_damping,
        refresh_every=refresh_every,
        statistics_every=statistics_every,
        batch_size=batch_size,
        layout=layout,
        mesh_axes=mesh_axes,
        rest=rest,
    )


def scale_by_sirf_shampoo(
    momentum: ArrayLike | None = 0.95,
    statistics_decay: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    mu_dtype: DTypeLike | None = None,
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    refresh_every: RefreshEvery = 10,
    statistics_every: Interval = 1,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    trust_radius: ArrayLike | None = None,
    layout: Layout = Layout(diagonal=None),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions the gradients' average by inverse Kronecker factors, without inverses or roots (SIRF-Shampoo).

        Sₙ ← b₂ Sₙ + (1 − b₂) G₍ₙ₎ (⊗_{j≠n} S̃ⱼ⁻¹) G₍ₙ₎ᵀ / Π_{j≠n} dⱼ,   S̃ₙ = Sₙ + (ρ·tr(Sₙ)/dₙ)·I
        D = M ×₁ S̃₁⁻¹ … ×_N S̃_N⁻¹

    The root-free step. With AdamW's length D has an rms of 0.4 in noise, and of up to one while gradients agree with
    the momentum before them. `rf.published.scale_by_sirf_shampoo` is the paper's own form.

    Args:
      momentum: decay of the gradients' average M, in [0, 1). A number or a traced scalar; None averages nothing.
      statistics_decay: b₂, in (0, 1). A number, a traced scalar or a schedule.
      nesterov: whether M is Nesterov's average; ignored without momentum.
      mu_dtype: floating-point dtype of M, see `scale_by_kronecker`.
      damping: ρ ≥ 0. A number, a traced scalar or a schedule.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`: added to B·S.
      refresh_every: T ≥ 1, `staggered(T)`, `growing(T)` or a callable, see `scale_by_kronecker`.
      statistics_every: c ≥ 1: the statistics take in every c-th gradient; or a callable. Each costs two products an
        axis.
      step_size: "adamw", at the length of AdamW's steps; or "newton", D itself for the curvature of the loss.
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`.
      trust_radius: r > 0, for `step_size="newton"`: a step L long in the metric of the curvature is shortened to
        min(1, (r/L)²) of it. None shortens nothing.
      layout: how parameters become blocks, and the structure and dtype of their factors. By default every parameter has
        factors, vectors diagonal ones.
      mesh_axes: mesh axes over which stacks are divided, see `scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.
      rest: what updates the parameters without factors, if the layout leaves any out.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature`, see `scale_by_kronecker`.

    Raises:
      ValueError: at construction for a Python number out of range or without effect; see `scale_by_kronecker`.
      TypeError: see `scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.scale_by_sirf_shampoo()
      >>> params = jnp.zeros((4, 3))
      >>> direction, state = tx.update(jax.random.normal(jax.random.key(0), (4, 3)), tx.init(params))
      >>> print(f"{jnp.sqrt(jnp.mean(direction**2)):.3f}")
      0.400

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    return _scale_by_curvature(
        RootFree(step_size=step_size, trust_radius=trust_radius, precision=precision),
        momentum,
        statistics_decay,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        damping=damping,
        absolute_damping=absolute_damping,
        refresh_every=refresh_every,
        statistics_every=statistics_every,
        batch_size=batch_size,
        layout=layout,
        mesh_axes=mesh_axes,
        rest=rest,
    )


def scale_by_kl_shampoo(
    momentum: ArrayLike | None = 0.9,
    statistics_decay: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    mu_dtype: DTypeLike | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    refresh_every: RefreshEvery = 10,
    statistics_every: Interval = 1,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    trust_radius: ArrayLike | None = None,
    layout: Layout = Layout(diagonal=None),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Whitens the gradients' average by the square roots of Kronecker factors, by products alone (KL-Shampoo).

        Sₙ ← b₂ Sₙ + (1 − b₂) G₍ₙ₎ (⊗_{j≠n} S̃ⱼ⁻¹) G₍ₙ₎ᵀ / Π_{j≠n} dⱼ,   S̃ₙ = Sₙ + (ρ·tr(Sₙ)/dₙ)·I
        D = M ×₁ S̃₁^(−1/2) … ×_N S̃_N^(−1/2)

    The whitening step. With AdamW's length D has an rms of 0.4 in noise, and of up to one while gradients agree with
    the momentum before them.

    Args:
      momentum: decay of the gradients' average M, in [0, 1). A number or a traced scalar; None averages nothing.
      statistics_decay: b₂, in (0, 1). A number, a traced scalar or a schedule.
      nesterov: whether M is Nesterov's average; ignored without momentum.
      mu_dtype: floating-point dtype of M, see `scale_by_kronecker`.
      damping: ρ ≥ 0. A number, a traced scalar or a schedule.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`: added to B·S.
      refresh_every: T ≥ 1, `staggered(T)`, `growing(T)` or a callable, see `scale_by_kronecker`.
      statistics_every: c ≥ 1: the statistics take in every c-th gradient; or a callable. Each costs two products an
        axis.
      step_size: "adamw", at the length of AdamW's steps; or "newton", D itself for the curvature of the loss.
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`.
      trust_radius: r > 0, for `step_size="newton"`: a step L long in the metric of the curvature is shortened to
        min(1, (r/L)²) of it. None shortens nothing.
      layout: how parameters become blocks, and the structure and dtype of their factors. By default every parameter has
        factors, vectors diagonal ones.
      mesh_axes: mesh axes over which stacks are divided, see `scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.
      rest: what updates the parameters without factors, if the layout leaves any out.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature`, see `scale_by_kronecker`.

    Raises:
      ValueError: at construction for a Python number out of range or without effect; see `scale_by_kronecker`.
      TypeError: see `scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.scale_by_kl_shampoo()
      >>> params = jnp.zeros((4, 3))
      >>> direction, state = tx.update(jax.random.normal(jax.random.key(0), (4, 3)), tx.init(params))
      >>> print(f"{jnp.sqrt(jnp.mean(direction**2)):.3f}")
      0.400

    References:
      Lin et al., KL-Shampoo, https://arxiv.org/abs/2509.03378
    """
    return _scale_by_curvature(
        Whitening(step_size=step_size, trust_radius=trust_radius, precision=precision),
        momentum,
        statistics_decay,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        damping=damping,
        absolute_damping=absolute_damping,
        refresh_every=refresh_every,
        statistics_every=statistics_every,
        batch_size=batch_size,
        layout=layout,
        mesh_axes=mesh_axes,
        rest=rest,
    )


def _scale_by_curvature(
    rule: CurvatureRule,
    momentum: ArrayLike | None,
    statistics_decay: optax.ScalarOrSchedule,
    *,
    nesterov: bool,
    absolute_damping: optax.ScalarOrSchedule,
    batch_size: ArrayLike | None,
    statistics_every: Interval,
    **others: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation of a rule, its numbers checked."""
    validate.require_number("statistics_decay", statistics_decay, validate.BELOW_ONE)
    validate.require_interval("statistics_every", statistics_every)
    validate.require_choice("nesterov", nesterov, (False, True))
    schedules.require_step_size(rule.step_size, absolute_damping, batch_size)
    validate.require_number("trust_radius", rule.trust_radius, validate.POSITIVE, schedule=False, optional=True)
    if rule.trust_radius is not None and rule.step_size == "adamw":
        raise ValueError(
            f"trust_radius takes effect with step_size='newton' alone, got {rule.trust_radius!r}: AdamW's length is "
            "a bound already. Leave it out."
        )
    return scale_by_kronecker(
        rule,
        weight=schedules.complement(statistics_decay, statistics_every),
        momentum=momentum,
        nesterov=nesterov and momentum is not None,
        absolute_damping=absolute_damping,
        batch_size=1 if rule.step_size == "adamw" else batch_size,
        statistics_every=statistics_every,
        **others,
    )

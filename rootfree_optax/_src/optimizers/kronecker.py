"""The whole Kronecker optimizers: one line in place of AdamW's."""

from fractions import Fraction

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.common.schedules import Interval, RefreshEvery, StepSize
from rootfree_optax._src.layout import Layout
from rootfree_optax._src.mesh.stacks_on_mesh import MeshAxes
from rootfree_optax._src.optimizers.links import MaskOrFn, descend
from rootfree_optax._src.transforms.adam import scale_by_relative_adam
from rootfree_optax._src.transforms.curvature import scale_by_kl_shampoo, scale_by_sirf_muon, scale_by_sirf_shampoo


def sirf_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    momentum: ArrayLike | None = 0.95,
    nesterov: bool = True,
    statistics_decay: optax.ScalarOrSchedule = 0.95,
    power: float | Fraction = Fraction(1, 4),  # a number that optax.inject_hyperparams leaves alone
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    refresh_every: RefreshEvery = 10,
    statistics_every: Interval = 1,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SIRF-Muon: Muon in the metric of the curvature, made of products alone.

        D = msign(M ×ₙ S̃ₙ^(−q)) ×ₙ S̃ₙ^(−q),   Sₙ the Kronecker factors of the gradients' curvature
        θ ← θ − learning_rate·(D + weight_decay·θ)

    The first arguments are AdamW's; b2 is 0.95 unless given, and eps is relative to a parameter's own gradients:
    `optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1)` becomes `rf.sirf_muon(3e-4, 0.9, 0.95, weight_decay=0.1)`. Hidden
    matrices step along D, at the length of AdamW's steps. The other parameters (embeddings, heads, vectors, scalars:
    see `Layout.diagonal`) are updated as AdamW does, and b1, b2 and eps are for them alone. `rf.describe` shows which
    are which. Nothing depends on the loss's scale or the batch size.

    See `scale_by_sirf_muon` for D.

    Args:
      learning_rate: a number, a traced scalar or a schedule: AdamW's.
      b1: of the parameters without factors: decay of the gradients' average, in [0, 1).
      b2: likewise: decay of the squared gradients' average, in [0, 1).
      eps: likewise: AdamW's ε, relative to the root mean square of the parameter's own gradients. At least 0.
      mu_dtype: floating-point dtype of the gradients' averages; by default each parameter's own.
      weight_decay: κ ≥ 0, decoupled, as AdamW's.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      momentum: of the matrices: decay of the gradients' average, in [0, 1). None averages nothing.
      nesterov: whether that average is Nesterov's; ignored without momentum.
      statistics_decay: b₂, in (0, 1), how much of the curvature a step keeps: 0.95 is a memory of 20 steps.
      power: q, of the curvature on both sides of msign: 1/2, 1/4 or 1/8, static. 1/2 is the full metric; Muon is the
        limit of 0, and of strong damping. Under `optax.inject_hyperparams` write a `Fraction`: it traces floats.
      damping: ρ ≥ 0, added to the curvature, relative to its mean eigenvalue along each axis.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`.
      refresh_every: T ≥ 1, `staggered(T)`, `growing(T)` or a callable, see `scale_by_kronecker`.
      statistics_every: c ≥ 1: the statistics take in every c-th gradient.
      step_size: "adamw", at the length of AdamW's steps; or "newton", D itself for the curvature of the loss.
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`. A `batch_size=` passed to `update`
        wins.
      layout: how parameters become blocks, and the structure and dtype of their factors.
      mesh_axes: mesh axes over which stacks of blocks are divided, see `scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer. Print `rf.describe(tx, params)` to see how large its factors are and what its steps cost.

    Raises:
      ValueError: at construction for a Python number out of range or without effect; see `scale_by_kronecker`.
      TypeError: see `scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> target = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
      >>> loss = lambda x: jnp.mean((x - target) ** 2)
      >>> tx = rf.sirf_muon(optax.linear_schedule(0.3, 0.0, 200), weight_decay=0.0)
      >>> x = jnp.zeros((2, 3))
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.2f}")
      3.00

    References:
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon; FISMO (q = 1/2), https://arxiv.org/abs/2601.21750;
      Mousse (q = 1/8, with Shampoo's statistics), https://arxiv.org/abs/2603.09697
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    preconditioner = scale_by_sirf_muon(
        momentum,
        statistics_decay,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        power=power,
        damping=damping,
        absolute_damping=absolute_damping,
        refresh_every=refresh_every,
        statistics_every=statistics_every,
        step_size=step_size,
        batch_size=batch_size,
        layout=layout,
        mesh_axes=mesh_axes,
        precision=precision,
        rest=scale_by_relative_adam(b1, b2, eps, mu_dtype=mu_dtype),
    )
    return optax.chain(preconditioner, *descend(learning_rate, weight_decay, mask))


def sirf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    momentum: ArrayLike | None = 0.95,
    nesterov: bool = True,
    statistics_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule = 0.1,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    refresh_every: RefreshEvery = 10,
    statistics_every: Interval = 1,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    trust_radius: ArrayLike | None = None,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SIRF-Shampoo: structured Shampoo without inverses and without the square root.

        D = M ×₁ S̃₁⁻¹ … ×_N S̃_N⁻¹,   Sₙ the Kronecker factors of the gradients' curvature
        θ ← θ − learning_rate·(D + weight_decay·θ)

    The first arguments are AdamW's; b2 is 0.95 unless given, and eps is relative to a parameter's own gradients:
    `optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1)` becomes `rf.sirf_shampoo(3e-4, 0.9, 0.95, weight_decay=0.1)`.
    Hidden matrices step along D, at the length of AdamW's steps. The other parameters (embeddings, heads, vectors,
    scalars: see `Layout.diagonal`) are updated as AdamW does, and b1, b2 and eps are for them alone. `rf.describe`
    shows which are which. Nothing depends on the loss's scale or the batch size.

    See `scale_by_sirf_shampoo` for D.

    Args:
      learning_rate: a number, a traced scalar or a schedule: AdamW's.
      b1: of the parameters without factors: decay of the gradients' average, in [0, 1).
      b2: likewise: decay of the squared gradients' average, in [0, 1).
      eps: likewise: AdamW's ε, relative to the root mean square of the parameter's own gradients. At least 0.
      mu_dtype: floating-point dtype of the gradients' averages; by default each parameter's own.
      weight_decay: κ ≥ 0, decoupled, as AdamW's.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      momentum: of the matrices: decay of the gradients' average, in [0, 1). None averages nothing.
      nesterov: whether that average is Nesterov's; ignored without momentum.
      statistics_decay: b₂, in (0, 1), how much of the curvature a step keeps: 0.95 is a memory of 20 steps.
      damping: ρ ≥ 0, added to the curvature, relative to its mean eigenvalue along each axis.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`.
      refresh_every: T ≥ 1, `staggered(T)`, `growing(T)` or a callable, see `scale_by_kronecker`.
      statistics_every: c ≥ 1: the statistics take in every c-th gradient.
      step_size: "adamw", at the length of AdamW's steps; or "newton", D itself for the curvature of the loss.
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`. A `batch_size=` passed to `update`
        wins.
      trust_radius: r > 0, for `step_size="newton"`: a step L long in the metric of the curvature is shortened to
        min(1, (r/L)²) of it. None shortens nothing.
      layout: how parameters become blocks, and the structure and dtype of their factors.
      mesh_axes: mesh axes over which stacks of blocks are divided, see `scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer. Print `rf.describe(tx, params)` to see how large its factors are and what its steps cost.

    Raises:
      ValueError: at construction for a Python number out of range or without effect; see `scale_by_kronecker`.
      TypeError: see `scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> target = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
      >>> loss = lambda x: jnp.mean((x - target) ** 2)
      >>> tx = rf.sirf_shampoo(optax.linear_schedule(0.3, 0.0, 200), weight_decay=0.0)
      >>> x = jnp.zeros((2, 3))
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(jnp.max(jnp.abs(x - target)) < 0.02)
      True

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    preconditioner = scale_by_sirf_shampoo(
        momentum,
        statistics_decay,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        damping=damping,
        absolute_damping=absolute_damping,
        refresh_every=refresh_every,
        statistics_every=statistics_every,
        step_size=step_size,
        batch_size=batch_size,
        trust_radius=trust_radius,
        layout=layout,
        mesh_axes=mesh_axes,
        precision=precision,
        rest=scale_by_relative_adam(b1, b2, eps, mu_dtype=mu_dtype),
    )
    return optax.chain(preconditioner, *descend(learning_rate, weight_decay, mask))


def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    momentum: ArrayLike | None = 0.9,
    nesterov: bool = True,
    statistics_decay: optax.ScalarOrSchedule = 0.95,
    damping: optax.ScalarOrSchedule = 1e-3,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    refresh_every: RefreshEvery = 10,
    statistics_every: Interval = 1,
    step_size: StepSize = "adamw",
    batch_size: ArrayLike | None = None,
    trust_radius: ArrayLike | None = None,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo, made of products alone.

        D = M ×₁ S̃₁^(−1/2) … ×_N S̃_N^(−1/2),   Sₙ the Kronecker factors of the gradients' curvature
        θ ← θ − learning_rate·(D + weight_decay·θ)

    The first arguments are AdamW's; b2 is 0.95 unless given, and eps is relative to a parameter's own gradients:
    `optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1)` becomes `rf.kl_shampoo(3e-4, 0.9, 0.95, weight_decay=0.1)`. Hidden
    matrices step along D, at the length of AdamW's steps. The other parameters (embeddings, heads, vectors, scalars:
    see `Layout.diagonal`) are updated as AdamW does, and b1, b2 and eps are for them alone. `rf.describe` shows which
    are which. Nothing depends on the loss's scale or the batch size.

    See `scale_by_kl_shampoo` for D.

    Args:
      learning_rate: a number, a traced scalar or a schedule: AdamW's.
      b1: of the parameters without factors: decay of the gradients' average, in [0, 1).
      b2: likewise: decay of the squared gradients' average, in [0, 1).
      eps: likewise: AdamW's ε, relative to the root mean square of the parameter's own gradients. At least 0.
      mu_dtype: floating-point dtype of the gradients' averages; by default each parameter's own.
      weight_decay: κ ≥ 0, decoupled, as AdamW's.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      momentum: of the matrices: decay of the gradients' average, in [0, 1). None averages nothing.
      nesterov: whether that average is Nesterov's; ignored without momentum.
      statistics_decay: b₂, in (0, 1), how much of the curvature a step keeps: 0.95 is a memory of 20 steps.
      damping: ρ ≥ 0, added to the curvature, relative to its mean eigenvalue along each axis.
      absolute_damping: λ ≥ 0, as the paper's, for `step_size="newton"`.
      refresh_every: T ≥ 1, `staggered(T)`, `growing(T)` or a callable, see `scale_by_kronecker`.
      statistics_every: c ≥ 1: the statistics take in every c-th gradient.
      step_size: "adamw", at the length of AdamW's steps; or "newton", D itself for the curvature of the loss.
      batch_size: B > 0, how many terms the loss averages, for `step_size="newton"`. A `batch_size=` passed to `update`
        wins.
      trust_radius: r > 0, for `step_size="newton"`: a step L long in the metric of the curvature is shortened to
        min(1, (r/L)²) of it. None shortens nothing.
      layout: how parameters become blocks, and the structure and dtype of their factors.
      mesh_axes: mesh axes over which stacks of blocks are divided, see `scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer. Print `rf.describe(tx, params)` to see how large its factors are and what its steps cost.

    Raises:
      ValueError: at construction for a Python number out of range or without effect; see `scale_by_kronecker`.
      TypeError: see `scale_by_kronecker`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rootfree_optax as rf
      >>> target = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
      >>> loss = lambda x: jnp.mean((x - target) ** 2)
      >>> tx = rf.kl_shampoo(optax.linear_schedule(0.3, 0.0, 200), weight_decay=0.0)
      >>> x = jnp.zeros((2, 3))
      >>> state = tx.init(x)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x.max():.2f}")
      3.00

    References:
      Lin et al., KL-Shampoo, https://arxiv.org/abs/2509.03378
    """
    preconditioner = scale_by_kl_shampoo(
        momentum,
        statistics_decay,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        damping=damping,
        absolute_damping=absolute_damping,
        refresh_every=refresh_every,
        statistics_every=statistics_every,
        step_size=step_size,
        batch_size=batch_size,
        trust_radius=trust_radius,
        layout=layout,
        mesh_axes=mesh_axes,
        precision=precision,
        rest=scale_by_relative_adam(b1, b2, eps, mu_dtype=mu_dtype),
    )
    return optax.chain(preconditioner, *descend(learning_rate, weight_decay, mask))

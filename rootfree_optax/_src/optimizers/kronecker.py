"""The whole Kronecker optimizers."""

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.common.schedules import Interval, RefreshEvery
from rootfree_optax._src.layout import Layout
from rootfree_optax._src.mesh.stacks_on_mesh import MeshAxes
from rootfree_optax._src.optimizers.links import MaskOrFn, descend
from rootfree_optax._src.transforms.kronecker import scale_by_sirf_shampoo


def sirf_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike | None = 0.6,
    nesterov: bool = True,
    statistics_decay: optax.ScalarOrSchedule = 0.9,
    damping: optax.ScalarOrSchedule = 2e-4,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
    batch_size: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    refresh_every: RefreshEvery = 1,
    statistics_every: Interval | None = None,
    trust_radius: ArrayLike | None = None,
    cache_preconditioner: bool = False,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SIRF-Shampoo: structured Shampoo without inverses and without the square root.

        θ ← θ − learning_rate·(D + weight_decay·θ)

    with the direction D of `scale_by_sirf_shampoo`. `rf.published.sirf_shampoo` is the method as published.

    Args:
      learning_rate: β₁, the step size: a number, a traced scalar or a schedule.
      momentum: in [0, 1), heavy-ball momentum of the gradients. None averages nothing and keeps no average.
      nesterov: whether momentum is Nesterov's; ignored without momentum.
      statistics_decay: in (0, 1), how much of the curvature a refresh keeps.
      damping: λ ≥ 0.
      weight_decay: κ ≥ 0, decoupled from the direction, as AdamW's. None adds nothing and needs no parameters.
      mask: which parameters decay, see `optax.add_decayed_weights`.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      mu_dtype: floating-point dtype of the gradients' average, see `scale_by_kronecker`.
      refresh_every: T ≥ 1, `staggered(T)`, `growing(T)` or a callable, see `scale_by_kronecker`.
      statistics_every: c ≥ 1: a refresh takes the mean curvature of every c-th gradient since the last one.
      trust_radius: r > 0, how long a block's direction may be in the metric of the curvature, for T > 1. Try 3.
      cache_preconditioner: whether K Kᵀ is kept in the state: steps without refresh take half the products.
      layout: how parameters become blocks, and the structure and dtype of their factors.
      mesh_axes: mesh axes over which stacks of blocks are divided, see `scale_by_kronecker`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      The optimizer. Print `rf.describe(tx, params)` to see how large its factors are and what its steps cost.

    Raises:
      ValueError: see `scale_by_kronecker`.
      TypeError: see `scale_by_kronecker`.

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
    preconditioner = scale_by_sirf_shampoo(
        momentum,
        statistics_decay,
        damping=damping,
        nesterov=nesterov,
        batch_size=batch_size,
        mu_dtype=mu_dtype,
        refresh_every=refresh_every,
        statistics_every=statistics_every,
        trust_radius=trust_radius,
        cache_preconditioner=cache_preconditioner,
        layout=layout,
        mesh_axes=mesh_axes,
        precision=precision,
    )
    return optax.chain(preconditioner, *descend(learning_rate, weight_decay, mask))

"""Root-free Shampoo with inverses as a transformation: plan, pack, refresh, precondition, unpack."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks import rf as inverse_update
from rootfree_optax._src.common import schedules, validate
from rootfree_optax._src.common.schedules import UpdateEvery
from rootfree_optax._src.layout import Layout, Plan
from rootfree_optax._src.mesh import stacks_on_mesh as sharded_plan
from rootfree_optax._src.mesh.stacks_on_mesh import BlockAxes
from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.stacks import refresh as refreshing
from rootfree_optax._src.stacks import stacks
from rootfree_optax._src.stacks.momentum import GradientAverage
from rootfree_optax._src.structures import dense, diagonal


class ScaleByRfShampooState(NamedTuple):
    """State of `scale_by_rf_shampoo`.

    Attributes:
      count: how many updates there have been.
      factors: for each stack of the plan, for each axis, the parts of S with a leading axis of blocks.
      velocity: for each stack, the gradients' heavy-ball average v; empty without `momentum`.
    """

    count: jax.Array  # type: ignore[assignment]  # Optax names it so, and tuples have a method of that name
    factors: Any
    velocity: Any = ()


def scale_by_rf_shampoo(
    preconditioner_lr: optax.ScalarOrSchedule = 0.2,
    damping: optax.ScalarOrSchedule = 2e-4,
    *,
    batch_size: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    update_every: UpdateEvery = 1,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
    block_axes: BlockAxes = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients by the inverses of Kronecker factors, without roots (RF-Shampoo).

        Hₙ = ( B · G₍ₙ₎ (⊗_{j≠n} Sⱼ⁻¹) G₍ₙ₎ᵀ + λ·Π_{j≠n} Tr(Sⱼ⁻¹)·I ) / Π_{j≠n} dⱼ
        Sₙ ← (1 − β₂) Sₙ + β₂ Hₙ            direction = G ×₁ S₁⁻¹ … ×_N S_N⁻¹

    By Cholesky solves in at least float32: for comparison and for small problems. `scale_by_sirf_shampoo` does the
    same with matrix products alone; with `refresh="published"` to first order in β₂, and clipped.

    Args:
      preconditioner_lr: β₂, in [0, 1]. A number, a traced scalar or a schedule.
      damping: λ ≥ 0. A number, a traced scalar or a schedule.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins.
      momentum: in [0, 1), of the gradients, see `scale_by_sirf_shampoo`, as the next two.
      nesterov: whether it is Nesterov's.
      accumulator_dtype: floating-point dtype of their average.
      update_every: T ≥ 1, or a callable, see `scale_by_sirf_shampoo`.
      layout: how parameters become blocks. The structures may be dense and diagonal.
      block_axes: mesh axes over which stacks are divided, see `scale_by_sirf_shampoo`.
      precision: of every matrix product, see `jax.lax.Precision`.

    Returns:
      A transformation whose `update` takes the extra arguments `batch_size` and `curvature` (see
      `scale_by_sirf_shampoo`).

    Raises:
      ValueError: as `scale_by_sirf_shampoo`, and at `init` for a structure that is neither dense nor diagonal.
      TypeError: at construction for a schedule where none may be; at `init` for parameters that are not real floating
        point.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.scale_by_rf_shampoo(preconditioner_lr=0.5, damping=0.0, batch_size=1)
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> direction, state = tx.update({"kernel": jnp.eye(2, 3)}, tx.init(params))
      >>> s1, s2 = rf.Layout().plan(params).factors(state)["kernel"]
      >>> print(f"{s1[0, 0]:.3f}")
      0.667

    References:
      Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective, ICML 2024,
      https://arxiv.org/abs/2402.03496
    """
    at_construction = batch_size
    validate.require_kronecker(preconditioner_lr, damping, batch_size, update_every)
    validate.require_at_most("preconditioner_lr", preconditioner_lr, 1)
    sharded_plan.require_block_axes(block_axes)
    average = GradientAverage(momentum, nesterov, accumulator_dtype)

    def init(params: optax.Params) -> ScaleByRfShampooState:
        plan = sharded_plan.for_parameters(layout.plan(params), block_axes, params)
        _require_dense_or_diagonal(plan.plan)
        factors = jax.tree.map(upcast, stacks.initial_factors(plan, params))
        arrays = stacks.typed_as_updated(plan, params, (factors, average.initial(plan, params, factors)))
        return ScaleByRfShampooState(jnp.zeros([], jnp.int32), *arrays)

    def update(
        updates: optax.Updates,
        state: ScaleByRfShampooState,
        params: optax.Params | None = None,
        *,
        batch_size: ArrayLike | None = None,
        curvature: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByRfShampooState]:
        del extra_args
        refresh = functools.partial(
            inverse_update.refresh,
            preconditioner_lr=schedules.value_at(preconditioner_lr, state.count),
            damping=schedules.value_at(damping, state.count),
            batch_size=schedules.resolve_batch_size(batch_size, at_construction),
            precision=precision,
        )
        plan = sharded_plan.for_state(layout, block_axes, state.factors, updates, params)
        gradients = stacks.pack(plan, updates)
        curvatures = stacks.curvatures(plan, curvature, updates, gradients)
        due = schedules.is_due(update_every, state.count)
        (factors,) = refreshing.refresh_when(due, plan, refresh, curvatures, (state.factors,))
        averages, velocity = average.update(plan, gradients, state.velocity)
        directions = stacks.precondition(plan, inverse_update.precondition, averages, factors)
        new_state = ScaleByRfShampooState(optax.safe_increment(state.count), factors, velocity)
        return stacks.unpack(plan, directions, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _require_dense_or_diagonal(plan: Plan) -> None:
    for block in plan.blocks:
        stack = plan.stacks[block.stack]
        for structure, dim in zip(stack.structures, stack.shape, strict=True):
            if structure not in (dense(dim), diagonal(dim)):
                raise ValueError(
                    f"rf_shampoo needs factors whose inverses have their structure, dense or diagonal, got "
                    f"{structure.name!r} at {block.name!r}. Use sirf_shampoo for other structures."
                )

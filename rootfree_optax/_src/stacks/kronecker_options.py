"""The options of the inverse-free transformation: what they may be, what goes together, what is chosen by default."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from rootfree_optax._src.blocks import apply as preconditioning
from rootfree_optax._src.blocks.factor_step import exact_factor, published_factor
from rootfree_optax._src.common import schedules, validate
from rootfree_optax._src.common.schedules import UpdateEvery, averaging_schedule
from rootfree_optax._src.layout.rules import DTypeRule, require_dtype_rule
from rootfree_optax._src.mesh.stacks_on_mesh import ShardedPlan
from rootfree_optax._src.structures.base import Structure

Refresh = Literal["published", "exact"]
InitialScale = ArrayLike | Literal["first_gradient"]

REFRESHES = {"published": published_factor, "exact": exact_factor}
_DEFAULT_PRECONDITIONER_LR = 0.1


@dataclasses.dataclass(frozen=True)
class FactorOptions:
    """The arguments of `scale_by_sirf_shampoo` that say what is kept of the curvature, when renewed and how applied.

    A riemannian_momentum of None keeps none.

    Raises:
      ValueError: for an option out of range, or for options that do not go together.
      TypeError: for a schedule where none may be.
    """

    preconditioner_dtype: DTypeRule
    riemannian_momentum: ArrayLike | None
    refresh: Refresh
    initial_scale: InitialScale
    update_every: UpdateEvery
    staggered: bool
    curvature_every: UpdateEvery | None
    trust_radius: ArrayLike | None
    cache_products: bool
    precision: jax.lax.PrecisionLike

    def __post_init__(self) -> None:
        require_dtype_rule(self.preconditioner_dtype)
        validate.require_constant(
            riemannian_momentum=self.riemannian_momentum,
            initial_scale=self.initial_scale,
            trust_radius=self.trust_radius,
        )
        validate.require_choice("refresh", self.refresh, REFRESHES)
        if isinstance(self.initial_scale, str):
            validate.require_choice("initial_scale", self.initial_scale, ("first_gradient",))
        validate.require_positive("initial_scale", self.initial_scale)
        validate.require_positive("trust_radius", self.trust_radius)
        validate.require_interval("curvature_every", self.curvature_every)
        validate.require_fraction("riemannian_momentum", self.riemannian_momentum)
        if self.staggered:
            schedules.require_static_interval(self.update_every)
        if self.refresh == "exact" and self.riemannian_momentum is not None:
            raise ValueError(
                "riemannian_momentum must be None or a Python 0 for refresh='exact', got "
                f"{self.riemannian_momentum!r}: S is a moving average already. Lower preconditioner_lr for a longer "
                "one, or pass refresh='published'."
            )

    @property
    def waits_for_gradient(self) -> bool:
        """Whether blocks start at the scale of their first gradient."""
        return isinstance(self.initial_scale, str)

    def precondition_block(self, batch_size: ArrayLike) -> Callable[..., jax.Array]:
        """Returns what makes a block's direction, (gradient, factors or products, structures=…) -> direction."""
        by_matrices = preconditioning.precondition_by_squares if self.cache_products else preconditioning.precondition
        if self.trust_radius is None:
            return functools.partial(by_matrices, precision=self.precision)
        return functools.partial(
            preconditioning.precondition_within,
            precondition=by_matrices,
            trust_radius=self.trust_radius,
            batch_size=batch_size,
            precision=self.precision,
        )

    def rate(self, preconditioner_lr: optax.ScalarOrSchedule | None) -> optax.ScalarOrSchedule:
        """Returns β₂ as it is given, or the schedule that stands for None, where one can.

        Raises:
          ValueError: for a Python number that the refresh does not admit, or for None where no schedule stands for it.
        """
        if self.refresh == "exact":
            validate.require_fraction("preconditioner_lr", preconditioner_lr)
        if preconditioner_lr is not None:
            return preconditioner_lr
        # Under `optax.inject_hyperparams` a callable's value comes, a bool.
        every = self.update_every
        if self.refresh != "exact" or callable(every) or jnp.result_type(every) == jnp.bool_:
            raise ValueError(
                f"preconditioner_lr must be given for refresh={self.refresh!r} and update_every={every!r}: only the "
                "exact refresh at an interval that is a number has a default. Pass 0.2, for example."
            )
        return averaging_schedule(_DEFAULT_PRECONDITIONER_LR, every)


def require_inverse_roots(plan: ShardedPlan) -> None:
    """Raises a ValueError if the exact refresh has no closed form for a structure of the plan."""
    for name, structure in _structures(plan):
        if not structure.has_inverse_root:
            raise ValueError(
                "refresh='exact' needs structures whose refresh has a closed form (dense, diagonal, block-diagonal, "
                "hierarchical, triltopleftdiag, triubottomrightdiag), "
                f"got {structure.name!r} at {name!r}. Use refresh='published' for others."
            )


def require_symmetric(plan: ShardedPlan) -> None:
    """Raises a ValueError if K Kᵀ is not of K's structure for one of the plan."""
    for name, structure in _structures(plan):
        if not structure.is_symmetric:
            raise ValueError(
                "cache_products=True needs structures that are closed under transposition (dense, diagonal, "
                f"block-diagonal), got {structure.name!r} at {name!r}. Use cache_products=False for others."
            )


def _structures(plan: ShardedPlan) -> Iterator[tuple[str, Structure]]:
    for block in plan.plan.blocks:
        for structure in plan.stacks[block.stack].structures:
            yield block.name, structure

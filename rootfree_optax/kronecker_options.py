"""The options of the inverse-free transformation: what they may be, what goes together, what is chosen by default."""

from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from rootfree_optax import hyperparameters as hyper
from rootfree_optax.averaging import averaging_schedule
from rootfree_optax.factor_step import exact_factor, published_factor
from rootfree_optax.hyperparameters import UpdateEvery
from rootfree_optax.sharded_plan import ShardedPlan
from rootfree_optax.structures.base import Structure

Refresh = Literal["published", "exact"]
InitialScale = ArrayLike | Literal["first_gradient"]

REFRESHES = {"published": published_factor, "exact": exact_factor}
_DEFAULT_PRECONDITIONER_LR = 0.1


def default_average(refresh: Refresh, update_every: UpdateEvery) -> optax.Schedule:
    """Returns the schedule that stands for a `preconditioner_lr` of None, where one can."""
    # Under `optax.inject_hyperparams` a callable's value comes, a bool.
    if refresh != "exact" or callable(update_every) or jnp.result_type(update_every) == jnp.bool_:
        raise ValueError(
            f"preconditioner_lr must be given for refresh={refresh!r} and update_every={update_every!r}: only the "
            "exact refresh at an interval that is a number has a default. Pass 0.2, for example."
        )
    return averaging_schedule(_DEFAULT_PRECONDITIONER_LR, update_every)


def require_valid(preconditioner_lr: Any, riemannian_momentum: Any, refresh: Any, initial_scale: Any) -> None:
    """Raises an error for an option out of range, or for options that do not go together."""
    hyper.require_constant(riemannian_momentum=riemannian_momentum, initial_scale=initial_scale)
    hyper.require_choice("refresh", refresh, REFRESHES)
    if isinstance(initial_scale, str):
        hyper.require_choice("initial_scale", initial_scale, ("first_gradient",))
    hyper.require_positive("initial_scale", initial_scale)
    if riemannian_momentum is not None:
        hyper.require_fraction("riemannian_momentum", riemannian_momentum)
    if refresh == "exact":
        hyper.require_fraction("preconditioner_lr", preconditioner_lr)
        if riemannian_momentum is not None:
            raise ValueError(
                "riemannian_momentum must be None or a Python 0 for refresh='exact', got "
                f"{riemannian_momentum!r}: S is a moving average already. Lower preconditioner_lr for a longer one, "
                "or pass refresh='published'."
            )


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

"""Momentum of gradients on a plan's stacks: which average of them the factors are applied to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.momentum import add_scaled, kept
from rootfree_optax._src.common import validate
from rootfree_optax._src.mesh.stacks_on_mesh import ShardedPlan
from rootfree_optax._src.stacks import stacks
from rootfree_optax._src.stacks.each_stack import Stacks


@dataclasses.dataclass(frozen=True)
class GradientAverage:
    """A heavy-ball average of the stacks of gradients, or Nesterov's, or the gradients themselves.

        v ← momentum·v + G,    average = v, or G + momentum·v

    Args:
      momentum: in [0, 1), a number or a traced scalar; None averages nothing.
      nesterov: whether it is Nesterov's.
      accumulator_dtype: of v; None is the widest of each stack's parameters.

    Raises:
      ValueError: for a momentum or a dtype that is none, or for Nesterov's momentum without momentum.
      TypeError: for a schedule.
    """

    momentum: ArrayLike | None
    nesterov: bool
    accumulator_dtype: DTypeLike | None

    def __post_init__(self) -> None:
        if self.momentum is None and self.nesterov:
            raise ValueError("momentum must be given for nesterov=True, got None. Pass a number, such as 0.9.")
        validate.require_constant(momentum=self.momentum)
        validate.require_fraction("momentum", self.momentum)
        validate.require_floating_dtype("accumulator_dtype", self.accumulator_dtype)

    def initial(self, plan: ShardedPlan, params: optax.Params, factors: Stacks) -> Stacks:
        """Returns v = 0 for each stack, or nothing without momentum; see `stacks.initial_factors` for no stack."""
        if self.momentum is None:
            return ()
        if not plan.stacks:
            return jnp.zeros([0])
        given = self.accumulator_dtype
        dtypes = tuple(jnp.dtype(widest if given is None else given) for widest in stacks.widest_dtypes(plan, params))
        return plan.on_shards(_zeros, (plan.stacks, dtypes), factors)

    def update(self, plan: ShardedPlan, gradients: Stacks, velocity: Stacks) -> tuple[Stacks, Stacks]:
        """Returns the average and the new v.

        Entries of G that are not finite show in the average, and leave v as it was.
        """
        if self.momentum is None or not plan.stacks:
            return gradients, velocity
        return plan.on_shards(_averaged, (self.momentum, self.nesterov), gradients, velocity)


def _zeros(shared: Any, factors: Stacks) -> Stacks:
    each = zip(*shared, factors, strict=True)
    return tuple(jnp.zeros((len(of_stack[0][0]), *stack.shape), dtype) for stack, dtype, of_stack in each)


def _averaged(shared: Any, gradients: Stacks, velocity: Stacks) -> tuple[Stacks, Stacks]:
    momentum, nesterov = shared
    add_past = lambda gradient, past: add_scaled(gradient, momentum, past)
    averages = jax.tree.map(add_past, gradients, velocity)
    new = jax.tree.map(kept, velocity, averages, gradients)
    return jax.tree.map(add_past, gradients, averages) if nesterov else averages, new

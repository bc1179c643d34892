"""What a block rule is: the mathematics of one block, from its first gradient to its direction."""

import abc
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.structures.base import Parts, Structure

BlockState: TypeAlias = Any
Factors: TypeAlias = tuple[Parts, ...]  # one matrix for each axis of a block
Structures: TypeAlias = Sequence[Structure]  # one for each axis of a block

NO_SCALE = -1e6  # of a block that has no `BlockRule.scale` yet


class Step(NamedTuple):
    """The numbers of one step, the same for all blocks.

    Attributes:
      count: how many updates there have been before this one, a scalar integer.
      weight: β₂, the weight of the newest curvature, or the step size of the factors. A scalar.
      damping: ρ ≥ 0, or λ ≥ 0 for rules whose damping is absolute. A scalar.
      absolute_damping: λ ≥ 0, a scalar, for rules whose damping is relative.
      batch_size: B > 0, how many terms the loss averages. A scalar.
      largest_scale: the base-2 logarithm of the largest `BlockRule.scale` of all blocks, a scalar; `NO_SCALE` without
        any.
      newest: the weight of this step's gradient in the momentum to precondition, a scalar in (0, 1]; 1 without any.
      is_own_curvature: whether the curvature is estimated from the gradients, rather than from another tree.
    """

    count: jax.Array  # type: ignore[assignment]  # Optax names it so, and tuples have a method of that name
    weight: ArrayLike
    damping: ArrayLike
    absolute_damping: ArrayLike = 0.0
    batch_size: ArrayLike = 1.0
    largest_scale: ArrayLike = NO_SCALE
    newest: ArrayLike = 1.0
    is_own_curvature: ArrayLike = True


class BlockFlops(NamedTuple):
    """Floating-point operations of a rule's products for one block, a multiply-add counting as two.

    Attributes:
      observe: of taking one gradient into the statistics.
      refresh: of renewing the preconditioner.
      precondition: of one direction.
    """

    observe: int
    refresh: int
    precondition: int


class BlockRule(abc.ABC):
    """How ONE block is preconditioned: what it keeps, how that starts and is renewed, and how it applies.

    A block is a tensor with axes of lengths d₁ … d_N, and its rule has one structure for each. `scale_by_kronecker`
    cuts parameters into blocks, maps the functions below over all blocks of one shape at once, says when each is
    called, and divides the blocks over a mesh. So a rule holds mathematics alone: no trees, schedules or devices. Each
    function is pure, and works under `jax.vmap`, `jax.jit` and `jax.lax.scan`.

    At every step, in this order:

        start        at the block's first gradient that is finite and not all zero
        observe      every `statistics_every` steps, if that is given
        refresh      every `refresh_every` steps
        precondition at every step

    A subclass is a frozen dataclass, hashable by its fields. One that holds numbers that may be traced is registered
    with `jax.tree_util.register_dataclass`.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, rootfree_optax as rf
      >>> @dataclasses.dataclass(frozen=True)
      ... class Normalize(rf.BlockRule):
      ...     def init(self, structures, dtypes):
      ...         return None
      ...     def precondition(self, state, momentum, *, gradient, structures, step):
      ...         return momentum / (jnp.linalg.norm(momentum) + 1e-30), state
      >>> tx = rf.scale_by_kronecker(Normalize())
      >>> params = jnp.zeros((2, 2))
      >>> direction, state = tx.update(3 * jnp.eye(2), tx.init(params))
      >>> print(direction.round(3))
      [[0.707 0.   ]
       [0.    0.707]]
    """

    @abc.abstractmethod
    def init(self, structures: Structures, dtypes: Sequence[jnp.dtype]) -> BlockState:
        """Returns what a block keeps, before its first gradient: a tree of arrays, with None for what is off.

        A NamedTuple with a field `factors`, the parts of each axis's factor, is read by `rf.factors` and `rf.info`, and
        compared with the parameters' shapes at every update.

        Args:
          structures: the structure of each axis, with its length `structure.dim`.
          dtypes: the dtype of each axis's factor.
        """

    def start(self, state: BlockState, gradient: jax.Array, *, structures: Structures, step: Step) -> BlockState:
        """Returns the state for a block that sees its first gradient which is finite and not all zero."""
        del gradient, structures, step
        return state

    def observe(self, state: BlockState, gradient: jax.Array, *, structures: Structures, step: Step) -> BlockState:
        """Returns the state after the statistics have taken in a gradient."""
        del gradient, structures, step
        return state

    def refresh(self, state: BlockState, gradient: jax.Array, *, structures: Structures, step: Step) -> BlockState:
        """Returns the state with a renewed preconditioner.

        Args:
          state: the block's state.
          gradient: [d₁, …, d_N], or [samples, d₁, …, d_N]: what the curvature is estimated from.
          structures: the structure of each axis.
          step: the numbers of this step.
        """
        del gradient, structures, step
        return state

    def refresh_stacks(
        self,
        states: Sequence[BlockState],
        gradients: Sequence[jax.Array],
        structures: Sequence[Structures],
        step: Step,
    ) -> list[BlockState]:
        """Returns the states of several stacks, refreshed; a rule may share work between blocks of different shapes.

        Args:
          states: of each stack, with a leading axis of blocks.
          gradients: likewise.
          structures: of each stack's axes.
          step: the numbers of this step.
        """
        refresh = lambda of_stack: jax.vmap(functools.partial(self.refresh, structures=of_stack, step=step))
        return [refresh(s)(*blocks) for s, *blocks in zip(structures, states, gradients, strict=True)]

    @abc.abstractmethod
    def precondition(
        self, state: BlockState, momentum: jax.Array, *, gradient: jax.Array, structures: Structures, step: Step
    ) -> tuple[jax.Array, BlockState]:
        """Returns the direction, [d₁, …, d_N], whose step is −learning_rate·direction, and the state.

        Args:
          state: the block's state.
          momentum: [d₁, …, d_N], the average of gradients to precondition; the gradient itself without momentum.
          gradient: [d₁, …, d_N], of this step.
          structures: the structure of each axis.
          step: the numbers of this step.
        """

    def options(self) -> Mapping[str, Any]:
        """Returns the options that decide what a state means, by name, as texts, numbers, Booleans or None.

        A state that was made with others is refused. Numbers that may change in training are not among them.
        """
        return {}

    def supports(self, structure: Structure) -> str | None:
        """Returns why an axis may not have a structure, as the end of a sentence, or None if it may."""
        del structure
        return None

    def flops(self, structures: Structures) -> BlockFlops | None:
        """Returns what the products for one block cost, which `rf.describe` shows; None for unknown."""
        del structures
        return None

    def scale(self, state: BlockState) -> jax.Array | None:
        """Returns the base-2 logarithm of the usual size of the block's gradients, a scalar; None if it is not kept.

        Before the first gradient it is −10⁶: finite, as debuggers stop at infinities.
        Rules find the largest of all blocks as `step.largest_scale`: a block far below it is rounding noise.
        """
        del state
        return None

    def waits(self, state: BlockState) -> jax.Array:
        """Returns whether the block still waits for its first gradient, a scalar. A rule with `start` says so here."""
        raise TypeError(f"{type(self).__name__} overrides start, so it must override waits, too.")

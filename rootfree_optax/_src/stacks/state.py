"""What is kept for each stack of blocks, and what one step of all of them is given."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.rule import BlockRule, BlockState, Step
from rootfree_optax._src.common.schedules import Staggered
from rootfree_optax._src.layout.stack import Stack

_LARGEST_SIZE = 2**31 - 1

Due: TypeAlias = jax.Array | bool | Staggered  # True itself where something is done at every step


class StackState(NamedTuple):
    """What is kept for one stack; every array has a leading axis of blocks.

    Attributes:
      block: what the rule keeps.
      momentum: the gradients' heavy-ball average v, [blocks, *shape]; None without momentum.
      squared_norm: of each block's last direction, [blocks].
      largest_gradient: the largest absolute value of each block's last gradient, [blocks]; zero for none.
      size: how many entries each block has, [blocks]; zero for blocks that pad the stack to a mesh. It never changes.
      number: which block of the plan's stack each one is, [blocks], −1 for padding; None if they are in order, with
        padding behind. It never changes.
    """

    block: BlockState
    momentum: Any  # an array, or None
    squared_norm: jax.Array
    largest_gradient: jax.Array
    size: jax.Array
    number: Any = None  # an array, or None


class StackStep(NamedTuple):
    """One step of all stacks: a tree of arrays that every device has, and of static values.

    Attributes:
      stacks: the plan's stacks.
      rule: what is done with a block.
      scalars: what the rule is given.
      observe: whether the statistics take in this gradient; None if they never do.
      refresh: whether preconditioners are refreshed, or how in turn.
      momentum: the decay of the gradients' average; None without momentum.
      nesterov: whether that average is Nesterov's.
      has_missing: whether there may be blocks of −∞, of parameters without a gradient.
    """

    stacks: tuple[Stack, ...]
    rule: BlockRule
    scalars: Step
    observe: Due | None
    refresh: Due
    momentum: ArrayLike | None
    nesterov: bool
    has_missing: bool = False


def init_stacks(
    placed: Any,
    rule: BlockRule,
    factor_dtypes: Sequence[Sequence[jnp.dtype]],
    momentum_dtypes: Sequence[DTypeLike] | None,
    anchor: jax.Array,
) -> tuple[StackState, ...]:
    """Returns the state of each stack before the first step.

    Args:
      placed: where the stacks are, see `WholeStacks`.
      rule: what is done with a block.
      factor_dtypes: for each stack, the dtype of each axis's factor.
      momentum_dtypes: for each stack; None without momentum.
      anchor: a zero that the state is to depend on, see `WholeStacks.anchor`.
    """

    def repeat(length: int, array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(array, (length, *array.shape)) + anchor.astype(array.dtype)

    def init(index: int, dtypes: Sequence[jnp.dtype], momentum_dtype: DTypeLike | None) -> StackState:
        stack, number = placed.stacks[index], placed.numbers(index).astype(jnp.int32)
        length = len(number)
        # A stack of no blocks still has arrays: each device's state has the same structure.
        momentum = None if momentum_dtype is None else jnp.zeros((length, *stack.shape), momentum_dtype)
        block = jax.tree.map(functools.partial(repeat, length), rule.init(stack.structures, dtypes))
        # An integer: a state whose numbers are set to zero starts anew, and a block without size would wait for ever.
        size = jnp.where(number < 0, 0, jnp.int32(min(math.prod(stack.shape), _LARGEST_SIZE)))
        return StackState(
            block,
            momentum,
            squared_norm=repeat(length, jnp.zeros([], jnp.float32)),
            largest_gradient=repeat(length, jnp.zeros([], jnp.float32)),
            size=size + anchor.astype(size.dtype),
            number=None if placed.holders is None else number + anchor.astype(number.dtype),
        )

    count = len(placed.stacks)
    each = zip(range(count), factor_dtypes, momentum_dtypes or (None,) * count, strict=True)
    return tuple([init(*of_stack) for of_stack in each])

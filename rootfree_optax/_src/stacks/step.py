"""One step of all stacks: blocks start, take in statistics, are refreshed when it is due, and precondition."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rootfree_optax._src.blocks.momentum import average_heavy_ball, total_weight
from rootfree_optax._src.blocks.rule import BlockRule, BlockState, Step
from rootfree_optax._src.common.schedules import Staggered
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.finite import max_abs
from rootfree_optax._src.stacks.state import StackState, StackStep

Blocks: TypeAlias = tuple[BlockState, ...]
LazyStacks: TypeAlias = tuple[jax.Array, ...] | Callable[[], tuple[jax.Array, ...]]

# Momentum adds gradients up, so that larger ones might overflow.
_LARGEST = 2.0**100
# Numbers in the factors that are refreshed at once: below that, products are too small to be fast.
_MIN_ENTRIES_PER_REFRESH = 2**18


def step_stacks(
    step: StackStep, gradients: tuple[jax.Array, ...], samples: LazyStacks, states: tuple[StackState, ...]
) -> tuple[tuple[jax.Array, ...], tuple[StackState, ...]]:
    """Returns each stack's directions, and its new state.

    Args:
      step: what is done at this step.
      gradients: for each stack, [blocks, *shape].
      samples: for each stack what the curvature is estimated from, [blocks, *shape] or [blocks, samples, *shape].
      states: of the stacks.
    """
    blocks = start_blocks(step, samples, states)
    if step.observe is not None:
        observe = functools.partial(_map_stacks, step, step.rule.observe, samples, blocks)
        blocks = observe() if step.observe is True else jax.lax.cond(step.observe, observe, lambda old=blocks: old)
    blocks = refresh_when_due(step, samples, blocks)
    stepped = [_precondition(step, *of_stack) for of_stack in zip(step.stacks, gradients, blocks, states, strict=True)]
    return tuple([direction for direction, _ in stepped]), tuple([state for _, state in stepped])


def _precondition(
    step: StackStep, stack: Stack, gradient: jax.Array, block: BlockState, old: StackState
) -> tuple[jax.Array, StackState]:
    average, momentum, numbers = gradient, old.momentum, step.numbers
    if step.momentum is not None:
        limited = jnp.where(jnp.isfinite(gradient), jnp.clip(gradient, -_LARGEST, _LARGEST), gradient)
        average, momentum = average_heavy_ball(old.momentum, limited, step.momentum, nesterov=step.nesterov)
        weight = total_weight(step.momentum, numbers.count + (2 if step.nesterov else 1))
        unit = jnp.asarray(1 - step.momentum, average.dtype) / weight.astype(average.dtype)
        average = average * unit
        numbers = numbers._replace(newest=unit * (1 + step.momentum) if step.nesterov else unit)
    direction, block = map_blocks(step.rule.precondition, stack, numbers)(block, average, gradient=gradient)
    axes = list(range(direction.ndim))
    wide = upcast(direction)
    squared_norm = jnp.einsum(wide, axes, wide, axes, [0]).astype(jnp.float32)
    largest = jnp.max(jnp.abs(gradient), tuple(axes[1:])).astype(jnp.float32)
    if step.has_missing:
        is_missing = jnp.max(gradient, tuple(axes[1:])) == -jnp.inf
        squared_norm = jnp.where(is_missing, old.squared_norm, squared_norm)
        largest = jnp.where(is_missing, old.largest_gradient, largest)
    return direction, StackState(block, momentum, squared_norm, largest, old.size, old.number)


def map_blocks(function: Any, stack: Stack, numbers: Step) -> Any:
    """Returns a function of a whole stack for one of a block that also takes its structures and the step's numbers."""
    return jax.vmap(functools.partial(function, structures=stack.structures, step=numbers))


def force(stacks: LazyStacks) -> tuple[jax.Array, ...]:
    """Returns stacks, computed here if they are lazy."""
    return stacks() if callable(stacks) else stacks


def _map_stacks(step: StackStep, function: Any, samples: LazyStacks, blocks: Blocks, *others: Any) -> Blocks:
    """Returns the results of a function of a block, its sample, and what else it takes, for all blocks."""
    stacks = zip(step.stacks, blocks, force(samples), *others, strict=True)
    return tuple([map_blocks(function, stack, step.numbers)(*of_stack) for stack, *of_stack in stacks])


def start_blocks(step: StackStep, samples: LazyStacks, states: Sequence[StackState]) -> Blocks:
    """Returns the blocks' states after those that see their first gradient have started.

    Args:
      step: the step.
      samples: the stacks that the curvature is estimated from.
      states: of the stacks.
    """
    blocks, rule = tuple([state.block for state in states]), step.rule
    if type(rule).start is BlockRule.start:
        return blocks
    waiting = [jax.vmap(rule.waits)(block) for block in blocks]
    # Only as long as a block waits: the search is a pass over all gradients. Padding would wait for ever.
    own = [w & (state.size > 0) for w, state in zip(waiting, states, strict=True)]
    search = lambda: tuple(map(jax.vmap(_is_first), force(samples), waiting))
    firsts = jax.lax.cond(_any(own), search, lambda: tuple(map(jnp.zeros_like, waiting)))

    def start_block(
        block: BlockState, sample: jax.Array, is_first: jax.Array, structures: Sequence[Any], step: Any
    ) -> BlockState:
        started = rule.start(block, sample, structures=structures, step=step)
        return jax.tree.map(lambda new, old: old if new is old else jnp.where(is_first, new, old), started, block)

    change = functools.partial(_map_stacks, step, start_block, samples, blocks, firsts)
    return jax.lax.cond(_any(firsts), change, lambda: blocks)


def _is_first(sample: jax.Array, waits: jax.Array) -> jax.Array:
    """Returns whether a waiting block's gradient tells something: it is finite, and not all zero."""
    largest = max_abs((sample,))
    return waits & (largest > 0) & jnp.isfinite(largest)


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, map(jnp.any, flags))


def refresh_when_due(step: StackStep, samples: LazyStacks, blocks: Blocks) -> Blocks:
    """Returns the blocks' states after a refresh of all, or of those whose turn it is, where that is due."""
    if isinstance(step.refresh, Staggered):
        return _refresh_in_turn(step, step.refresh.period, force(samples), blocks)
    refresh = lambda: tuple(
        [
            _refresh_in_portions(step, stack, sample, block)
            for stack, sample, block in zip(step.stacks, force(samples), blocks, strict=True)
        ]
    )
    return refresh() if step.refresh is True else jax.lax.cond(step.refresh, refresh, lambda: blocks)


def _refresh_in_portions(step: StackStep, stack: Stack, sample: jax.Array, block: BlockState) -> BlockState:
    refresh = map_blocks(step.rule.refresh, stack, step.numbers)
    size, length = _portion(stack, len(sample)), len(sample)
    if size == length:
        # A loop of one turn would keep the compiler from working on the arrays as they are.
        return refresh(block, sample)
    turn = functools.partial(_take_turn, refresh, size, sample)
    return jax.lax.fori_loop(0, -(-length // size), turn, block)


def _portion(stack: Stack, length: int) -> int:
    """Returns how many blocks of a stack are refreshed at once: a sixteenth to an eighth, if that is work enough.

    A refresh needs several times the memory that it changes, so that one of everything at once would decide how much
    memory a model's training needs.
    """
    entries = sum([math.prod(shape) for s in stack.structures for shape in s.part_shapes])
    enough = -(-_MIN_ENTRIES_PER_REFRESH // entries)
    if enough >= length:
        return length
    sizes = range(max(enough, -(-length // 16)), max(enough, -(-length // 8)) + 1)
    return min(length, min(sizes, key=lambda size: -length % size))


def _refresh_in_turn(step: StackStep, period: int, samples: tuple[jax.Array, ...], blocks: Blocks) -> Blocks:
    """Returns the blocks' states after some of each stack were refreshed, so that all are once in every period.

    Of a stack of n blocks it is ⌈n/T⌉ at each step, from one on that differs between stacks, until all have had their
    turn; then none for the rest of the period.
    """
    refreshed, begin = [], 0
    for stack, sample, block in zip(step.stacks, samples, blocks, strict=True):
        size = -(-len(sample) // period)
        turns = -(-len(sample) // size)
        index = (step.numbers.count - begin) % period
        begin += turns  # so that stacks of few turns have them at different steps
        refresh = map_blocks(step.rule.refresh, stack, step.numbers)
        turn = functools.partial(_take_turn, refresh, size, sample, index)
        refreshed.append(turn(block) if turns == period else jax.lax.cond(index < turns, turn, lambda old: old, block))
    return tuple(refreshed)


def _take_turn(
    refresh: Callable[..., BlockState], size: int, sample: jax.Array, index: jax.Array | int, old: BlockState
) -> BlockState:
    """Returns a stack's state after the index-th turn, of `size` blocks; the last turn has what is left."""
    length = len(sample)
    if size == length:
        return refresh(old, sample)
    first = jnp.minimum(index * size, length - size)
    rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
    before = jax.tree.map(rows, old)
    after = refresh(before, rows(sample))
    if length % size:
        is_due = first + jnp.arange(size) >= index * size  # others had an earlier turn
        after = jax.tree.map(functools.partial(jax.vmap(jnp.where), is_due), after, before)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
    return jax.tree.map(write, old, after)


def measure_largest_scale(rule: BlockRule, states: tuple[StackState, ...], local_axes: tuple[str, ...]) -> jax.Array:
    """Returns the largest `BlockRule.scale` of all blocks, a scalar; −∞ if the rule keeps none.

    Args:
      rule: what is done with a block.
      states: of the stacks.
      local_axes: the mesh axes over which the states are one device's own parts, inside `jax.shard_map`.
    """
    if type(rule).scale is BlockRule.scale:
        return jnp.asarray(-jnp.inf, jnp.float32)
    scale_of: Any = jax.vmap(rule.scale)
    largest = jnp.max(jnp.stack([jnp.max(scale_of(state.block)) for state in states]))
    return jax.lax.pmax(largest, local_axes) if local_axes else largest

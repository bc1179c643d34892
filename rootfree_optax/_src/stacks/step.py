"""One step of all stacks: blocks start, take in statistics, are refreshed when it is due, and precondition."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rootfree_optax._src.blocks.momentum import add_scaled, average_heavy_ball, total_weight
from rootfree_optax._src.blocks.rule import NO_SCALE, BlockRule, BlockState, Step
from rootfree_optax._src.common.schedules import Staggered
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.numerics.arithmetic import max_abs, upcast
from rootfree_optax._src.stacks.state import StackState, StackStep

Blocks: TypeAlias = tuple[BlockState, ...]
LazyStacks: TypeAlias = tuple[jax.Array, ...] | Callable[[], tuple[jax.Array, ...]]

# Momentum adds gradients up, so that larger ones might overflow.
_LARGEST = 2.0**100
# Numbers in the blocks or factors that are worked on at once: below that, products are too small to be fast.
_MIN_ENTRIES_AT_ONCE = 2**19
# Numbers in the factors that stacks are refreshed together for: some megabytes, which no training feels.
_MIN_ENTRIES_TOGETHER = 2**22


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
    blocks = refresh_when_due(step, samples, observe_when_due(step, samples, start_blocks(step, samples, states)))
    ready = [state._replace(block=block) for state, block in zip(states, blocks, strict=True)]
    stepped = [
        _in_portions(functools.partial(_precondition, step, stack), _portion(len(gradient), stack.shape), of_stack)
        for stack, gradient, of_stack in zip(step.stacks, gradients, zip(gradients, ready, strict=True), strict=True)
    ]
    return tuple([direction for direction, _ in stepped]), tuple([state for _, state in stepped])


def _precondition(
    step: StackStep, stack: Stack, of_stack: tuple[jax.Array, StackState]
) -> tuple[jax.Array, StackState]:
    """Returns a stack's directions, in the gradients' place and dtype, and its new state."""
    gradient, old = of_stack
    average, momentum, scalars = gradient, old.momentum, step.scalars
    if step.momentum is not None:
        limited = jnp.where(jnp.isfinite(gradient), jnp.clip(gradient, -_LARGEST, _LARGEST), gradient)
        average, momentum = average_heavy_ball(old.momentum, limited, step.momentum, nesterov=step.nesterov)
        weight = total_weight(step.momentum, scalars.count + (2 if step.nesterov else 1))
        unit = jnp.asarray(1 - step.momentum, average.dtype) / weight.astype(average.dtype)
        average = average * unit
        scalars = scalars._replace(newest=add_scaled(unit, step.momentum, unit) if step.nesterov else unit)
    direction, block = map_blocks(step.rule.precondition, stack, scalars)(old.block, average, gradient=gradient)
    axes = list(range(direction.ndim))
    wide = upcast(direction)
    squared_norm = jnp.einsum(wide, axes, wide, axes, [0]).astype(jnp.float32)
    largest = jnp.max(jnp.abs(gradient), tuple(axes[1:])).astype(jnp.float32)
    if step.has_missing:
        is_missing = jnp.max(gradient, tuple(axes[1:])) == -jnp.inf
        squared_norm = jnp.where(is_missing, old.squared_norm, squared_norm)
        largest = jnp.where(is_missing, 0, largest)
    return direction.astype(gradient.dtype), StackState(block, momentum, squared_norm, largest, old.size, old.number)


def map_blocks(function: Any, stack: Stack, scalars: Step) -> Any:
    """Maps a function of one block over a stack, given the stack's structures and the step's scalars."""
    return jax.vmap(functools.partial(function, structures=stack.structures, step=scalars))


def force(stacks: LazyStacks) -> tuple[jax.Array, ...]:
    """Returns stacks, computed here if they are lazy."""
    return stacks() if callable(stacks) else stacks


def _map_stacks(step: StackStep, function: Any, old: Any, samples: LazyStacks, *others: Any) -> Any:
    """Maps a function of a block over all stacks, given each stack's old state, its sample and its other arguments."""
    return tuple(
        [
            _in_portions(
                map_blocks(function, stack, step.scalars), _portion(len(sample), stack.shape), was, sample, *rest
            )
            for stack, was, sample, *rest in zip(step.stacks, old, force(samples), *others, strict=True)
        ]
    )


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
    search = functools.partial(_map_stacks, step, _is_first, tuple(waiting), samples)
    firsts = jax.lax.cond(jnp.concatenate(own).any(), search, lambda: tuple(map(jnp.zeros_like, waiting)))

    def start_block(
        block: BlockState, sample: jax.Array, is_first: jax.Array, structures: Sequence[Any], step: Any
    ) -> BlockState:
        started = rule.start(block, sample, structures=structures, step=step)
        return jax.tree.map(lambda new, old: old if new is old else jnp.where(is_first, new, old), started, block)

    start = functools.partial(_map_stacks, step, start_block, blocks, samples, firsts)
    return jax.lax.cond(jnp.concatenate(firsts).any(), start, lambda: blocks)


def observe_when_due(step: StackStep, samples: LazyStacks, blocks: Blocks) -> Blocks:
    """Returns the blocks' states after those statistics that are due."""
    if step.observe is None:
        return blocks
    observe = functools.partial(_map_stacks, step, step.rule.observe, blocks, samples)
    return observe() if step.observe is True else jax.lax.cond(step.observe, observe, lambda: blocks)


def _is_first(waits: jax.Array, sample: jax.Array, *, structures: Sequence[Any], step: Step) -> jax.Array:
    """Returns whether a waiting block's gradient tells something: it is finite, and not all zero or subnormal."""
    del structures, step
    largest = upcast(max_abs((sample,)))
    return waits & (largest >= jnp.finfo(largest.dtype).tiny) & jnp.isfinite(largest)


def refresh_when_due(step: StackStep, samples: LazyStacks, blocks: Blocks) -> Blocks:
    """Returns the blocks' states after a refresh of all, or of those whose turn it is, where that is due."""
    if isinstance(step.refresh, Staggered):
        return _refresh_in_turn(step, step.refresh.period, force(samples), blocks)
    refresh = functools.partial(_refresh_in_groups, step, samples, blocks)
    return refresh() if step.refresh is True else jax.lax.cond(step.refresh, refresh, lambda: blocks)


def _refresh_in_groups(step: StackStep, lazy: LazyStacks, blocks: Blocks) -> Blocks:
    """Returns the refreshed blocks: small stacks together, so that they share a program, large ones in portions."""
    refreshed, samples = list(blocks), force(lazy)
    for group in _groups(step, list(map(len, samples))):
        stacks = [step.stacks[index] for index in group]
        if len(group) == 1:
            [index], [stack] = group, stacks
            size = _portion(len(samples[index]), *stack.part_shapes, most=16)
            refresh = functools.partial(_refresh_stack, step, stack)
            refreshed[index] = _in_portions(refresh, size, blocks[index], samples[index])
        else:
            own = [blocks[index] for index in group], [samples[index] for index in group]
            renewed = step.rule.refresh_stacks(*own, [stack.structures for stack in stacks], step.scalars)
            for index, block in zip(group, renewed, strict=True):
                refreshed[index] = block
    return tuple(refreshed)


def _groups(step: StackStep, lengths: Sequence[int]) -> list[list[int]]:
    """Returns the stacks that are refreshed together, in groups of factors as large as a quarter of all blocks."""
    if type(step.rule).refresh_stacks is BlockRule.refresh_stacks:
        return [[index] for index in range(len(lengths))]
    entries = [sum(map(math.prod, stack.part_shapes)) for stack in step.stacks]
    sizes = [length * own for own, length in zip(entries, lengths, strict=True)]
    total = sum([length * math.prod(stack.shape) for stack, length in zip(step.stacks, lengths, strict=True)])
    limit = max(_MIN_ENTRIES_TOGETHER, total // 4)
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        if sizes[index] > room:
            groups, room = [*groups, []], limit
        groups[-1].append(index)
        room -= sizes[index]
    return groups


def _refresh_stack(step: StackStep, stack: Stack, block: BlockState, sample: jax.Array) -> BlockState:
    """Returns the refreshed blocks of one stack."""
    [refreshed] = step.rule.refresh_stacks([block], [sample], [stack.structures], step.scalars)
    return refreshed


def _portion(length: int, *shapes: Shape, most: int = 8) -> int:
    """Returns how many blocks of a stack are worked on at once: a small part of them, if that is work enough.

    All at once would need several times the stack's memory, and so decide how much memory a model's training needs.

    Args:
      length: of the stack.
      shapes: of a block, or of its factors.
      most: into at least so many portions, and at most twice as many, a large stack is divided.
    """
    enough = -(-_MIN_ENTRIES_AT_ONCE // sum(map(math.prod, shapes)))
    if enough >= length:
        return length
    sizes = range(max(enough, -(-length // (2 * most))), max(enough, -(-length // most)) + 1)
    return min(length, min(sizes, key=lambda size: -length % size))


def _in_portions(function: Callable[..., Any], size: int, old: Any, *samples: jax.Array) -> Any:
    """Returns `function(old, *samples)` of a stack, which replaces what was, `size` blocks at once."""
    length = len(jax.tree.leaves((old, samples))[0])
    # A loop of one turn would keep the compiler from working on the arrays as they are.
    if size == length:
        return function(old, *samples)
    return jax.lax.fori_loop(0, -(-length // size), functools.partial(_take_turn, function, size, samples), old)


def _refresh_in_turn(step: StackStep, period: int, samples: tuple[jax.Array, ...], blocks: Blocks) -> Blocks:
    """Returns the blocks' states after some of each stack were refreshed, so that all are once in every period.

    Of a stack of n blocks it is ⌈n/T⌉ at each step, from one on that differs between stacks, until all have had their
    turn; then none for the rest of the period.
    """
    refreshed, begin = [], 0
    for stack, sample, block in zip(step.stacks, samples, blocks, strict=True):
        size = -(-len(sample) // period)
        turns = -(-len(sample) // size)
        index = (step.scalars.count - begin) % period
        begin += turns  # so that stacks of few turns have them at different steps
        turn = functools.partial(_take_turn, functools.partial(_refresh_stack, step, stack), size, (sample,), index)
        refreshed.append(turn(block) if turns == period else jax.lax.cond(index < turns, turn, lambda old: old, block))
    return tuple(refreshed)


def _take_turn(
    function: Callable[..., Any], size: int, samples: tuple[jax.Array, ...], index: jax.Array | int, old: Any
) -> Any:
    """Returns a stack's state after the index-th turn, of `size` blocks; the last turn has what is left."""
    length = len(jax.tree.leaves((old, samples))[0])
    if size == length:
        return function(old, *samples)
    first = jnp.minimum(index * size, length - size)
    rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
    # The rows are read once: as long as the whole has another reader, the compiler would write to a copy of it.
    before = jax.lax.optimization_barrier(jax.tree.map(rows, old))
    after = function(before, *map(rows, samples))
    is_due = first + jnp.arange(size) >= index * size  # others had an earlier turn

    def write(whole: jax.Array, was: jax.Array, now: jax.Array) -> jax.Array:
        # What did not change is not written back: the compiler would copy the whole array for it, at every turn.
        if now is was:
            return whole
        chosen = jax.vmap(jnp.where)(is_due, now, was) if length % size else now
        return jax.lax.dynamic_update_slice_in_dim(whole, chosen, first, axis=0)

    return jax.tree.map(write, old, before, after)


def measure_largest_scale(rule: BlockRule, states: tuple[StackState, ...], local_axes: tuple[str, ...]) -> jax.Array:
    """Returns the largest `BlockRule.scale` of all blocks whose last gradient was not all zero, a scalar.

    It is `NO_SCALE` if there is none, or if the rule keeps no scale. A block that has fallen silent keeps its scale,
    beside which all others might be taken for rounding noise, for ever.

    Args:
      rule: what is done with a block.
      states: of the stacks.
      local_axes: the mesh axes over which the states are one device's own parts, inside `jax.shard_map`.
    """
    if type(rule).scale is BlockRule.scale:
        return jnp.asarray(NO_SCALE, jnp.float32)
    scale_of: Any = jax.vmap(rule.scale)
    active = [jnp.where(state.largest_gradient != 0, scale_of(state.block), NO_SCALE) for state in states]
    largest = jnp.max(jnp.stack([jnp.max(scales) for scales in active]))
    return jax.lax.pmax(largest, local_axes) if local_axes else largest

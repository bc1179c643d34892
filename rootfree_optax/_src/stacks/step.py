"""One step of all stacks: blocks start, take in statistics, are refreshed, and precondition."""

import jax
import jax.numpy as jnp

from rootfree_optax._src.blocks.diagonal import total_weight
from rootfree_optax._src.blocks.momentum import average_heavy_ball
from rootfree_optax._src.blocks.rule import BlockRule, BlockState
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.stacks.refresh import LazyStacks, observe_when_due, refresh_when_due, start_blocks
from rootfree_optax._src.stacks.state import StackState, StackStep, map_blocks


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
    blocks = start_blocks(step, samples, tuple([state.block for state in states]))
    blocks = observe_when_due(step, samples, blocks)
    blocks = refresh_when_due(step, samples, blocks)
    stepped = [_precondition(step, *of_stack) for of_stack in zip(step.stacks, gradients, blocks, states, strict=True)]
    return tuple([direction for direction, _ in stepped]), tuple([state for _, state in stepped])


def _precondition(
    step: StackStep, stack: Stack, gradient: jax.Array, block: BlockState, old: StackState
) -> tuple[jax.Array, StackState]:
    average, momentum = gradient, old.momentum
    if step.momentum is not None:
        average, momentum = average_heavy_ball(old.momentum, gradient, step.momentum, nesterov=step.nesterov)
        weight = total_weight(step.momentum, step.numbers.count + 1 + step.nesterov)
        average = average * (jnp.asarray(1 - step.momentum, average.dtype) / weight.astype(average.dtype))
    direction, block = map_blocks(step.rule.precondition, stack, step.numbers)(block, average, gradient=gradient)
    flat = upcast(direction).reshape(len(direction), -1)
    mean_square = jnp.einsum("bi,bi->b", flat, flat).astype(jnp.float32) / flat.shape[1]
    is_idle = jnp.all(gradient == 0, tuple(range(1, gradient.ndim)))
    return direction, StackState(block, momentum, mean_square, is_idle, old.size)


def measure_largest_scale(rule: BlockRule, states: tuple[StackState, ...], local_axes: tuple[str, ...]) -> jax.Array:
    """Returns the largest `BlockRule.scale` of all blocks, a scalar; −∞ if the rule keeps none.

    Args:
      rule: what is done with a block.
      states: of the stacks.
      local_axes: the mesh axes over which the states are one device's own parts, inside `jax.shard_map`.
    """
    if type(rule).scale is BlockRule.scale:
        return jnp.asarray(-jnp.inf, jnp.float32)
    largest = jnp.max(jnp.stack([jnp.max(jax.vmap(rule.scale)(state.block)) for state in states]))
    return jax.lax.pmax(largest, local_axes) if local_axes else largest

"""When the blocks of a plan's stacks start and are refreshed: all at once, or in turn; on each device its own."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rootfree_optax._src.blocks.factor_start import is_first
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.mesh.stacks_on_mesh import ShardedPlan
from rootfree_optax._src.stacks.each_stack import Given, Stacks, as_tree, each_stack, made, of_stack

_ENOUGH = 2**18  # numbers in the factors that are refreshed at once: below that, products are too small to be fast


def start(
    plan: ShardedPlan,
    start_block: Callable[..., tuple[Any, ...]],
    curvatures: Given,
    state: tuple[Stacks, Stacks, Stacks],
) -> tuple[Stacks, Stacks, Stacks]:
    """Returns factors, products and flags after the blocks that see their first gradient have started.

    Args:
      plan: the plan of the stacks.
      start_block: for one block, (curvature, factors, products, first, structures=…) -> (factors, products).
      curvatures: the stacks that the curvature is estimated from, or a function that returns them.
      state: the factors, the products K Kᵀ (or empty), and whether each block has started.
    """
    if not plan.stacks:
        return state
    return plan.on_shards(_started, (plan.stacks, plan.axes, as_tree(start_block)), curvatures, state)


def _started(shared: Any, curvatures: Given, state: tuple[Stacks, Stacks, Stacks]) -> tuple[Stacks, Stacks, Stacks]:
    stacks, axes, start_block = shared
    factors, products, started = state
    # Only as long as a block waits: the search is a pass over all gradients. Padding would wait for ever.
    waiting = (~(flags | _is_padding(stack, len(flags), axes)) for stack, flags in zip(stacks, started, strict=True))
    waits = functools.reduce(jnp.logical_or, map(jnp.any, waiting))
    search = lambda: tuple(map(jax.vmap(is_first), made(curvatures), started))
    firsts = jax.lax.cond(waits, search, lambda: jax.tree.map(jnp.zeros_like, started))

    def scaled(stack: Stack, curvature_and_first: Any, old: tuple[Any, ...]) -> tuple[Any, ...]:
        curvature, first = curvature_and_first
        return of_stack(start_block, stack)(curvature, *old, first)

    change = lambda: each_stack(scaled, stacks, tuple(zip(made(curvatures), firsts, strict=True)), (factors, products))
    factors, products = jax.lax.cond(
        functools.reduce(jnp.logical_or, map(jnp.any, firsts)), change, lambda: (factors, products)
    )
    return factors, products, tuple(map(jnp.logical_or, started, firsts))


def _is_padding(stack: Stack, length: int, axes: tuple[str, ...]) -> jax.Array:
    """Returns which of this device's blocks of a stack, `length` of them, are padding."""
    first = jax.lax.axis_index(axes) * length if axes else 0
    return first + jnp.arange(length) >= stack.count


def observe_when(
    due: jax.Array | bool,
    plan: ShardedPlan,
    observe_block: Callable[..., tuple[Any]],
    curvatures: Given,
    factors: Stacks,
    observed: Stacks,
) -> Stacks:
    """Returns what has been observed after every block has observed a gradient, or what it was where it is not due.

    Args:
      due: whether to observe, a scalar.
      plan: the plan of the stacks.
      observe_block: for one block, (curvature, factors, observed, structures=…) -> (observed,).
      curvatures: the stacks that the curvature is estimated from, or a function that returns them.
      factors: the stacks of factors.
      observed: for each stack, what its blocks have observed.
    """
    if not plan.stacks:
        return observed
    return plan.on_shards(_observed, (plan.stacks, due, as_tree(observe_block)), curvatures, factors, observed)


def _observed(shared: Any, curvatures: Given, factors: Stacks, observed: Stacks) -> Stacks:
    stacks, due, observe_block = shared

    def observe(stack: Stack, given: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[Any, ...]:
        return of_stack(observe_block, stack)(*given, *old)

    inputs = lambda: tuple(zip(made(curvatures), factors, strict=True))
    all_observed = lambda: each_stack(observe, stacks, inputs(), (observed,))[0]
    return all_observed() if due is True else jax.lax.cond(due, all_observed, lambda: observed)


def refresh_when(
    due: jax.Array | bool,
    plan: ShardedPlan,
    refresh: Callable[..., tuple[Any, ...]],
    curvatures: Given,
    state: tuple[Stacks, ...],
) -> tuple[Stacks, ...]:
    """Returns the state that `refresh` makes of each stack's, or the old state where it is not due.

    Args:
      due: whether to refresh, a scalar.
      plan: the plan of the stacks.
      refresh: for one block, (curvature, *state, structures=…) -> new state.
      curvatures: the stacks that the curvature is estimated from, or a function that returns them.
      state: tuples over the stacks, or empty, and then passed for each stack and returned as that.
    """
    if not plan.stacks:
        return state
    return plan.on_shards(_refreshed, (plan.stacks, due, as_tree(refresh)), curvatures, state)


def _refreshed(shared: Any, curvatures: Given, state: tuple[Stacks, ...]) -> tuple[Stacks, ...]:
    stacks, due, refresh = shared

    def refreshed(stack: Stack, curvature: jax.Array, old: tuple[Any, ...]) -> tuple[Any, ...]:
        size, length = _portion(stack, len(curvature)), len(curvature)
        turn = functools.partial(_turn, of_stack(refresh, stack), size, curvature)
        # A loop of one turn would keep the compiler from working on the arrays as they are.
        return turn(0, old) if size == length else jax.lax.fori_loop(0, -(-length // size), turn, old)

    all_refreshed = lambda: each_stack(refreshed, stacks, made(curvatures), state)
    return all_refreshed() if due is True else jax.lax.cond(due, all_refreshed, lambda: state)


def _portion(stack: Stack, length: int) -> int:
    """Returns how many blocks of a stack are refreshed at once: a sixteenth to an eighth, if that is work enough.

    A refresh needs several times the memory that it changes, so that one of everything at once would decide how much
    memory a model's training needs.
    """
    enough = -(-_ENOUGH // sum(math.prod(shape) for s in stack.structures for shape in s.part_shapes))
    sizes = range(max(enough, -(-length // 16)), max(enough, -(-length // 8)) + 1)
    return min(length, min(sizes, key=lambda size: -length % size))


def refresh_in_turn(
    count: jax.Array,
    period: int,
    plan: ShardedPlan,
    refresh: Callable[..., tuple[Any, ...]],
    curvatures: Given,
    state: tuple[Stacks, ...],
) -> tuple[Stacks, ...]:
    """Returns the state after some blocks of each stack were refreshed, so that all are once in every period.

    Of a stack of n blocks it is ⌈n/T⌉ at each step, from one on that differs between stacks, until all have had their
    turn; then none for the rest of the period.

    Args:
      count: the step's number.
      period: T ≥ 1.
      plan: as for `refresh_when`.
      refresh: as for `refresh_when`.
      curvatures: as for `refresh_when`.
      state: as for `refresh_when`.
    """
    if not plan.stacks:
        return state
    return plan.on_shards(_refreshed_in_turn, (plan.stacks, count, period, as_tree(refresh)), curvatures, state)


def _refreshed_in_turn(shared: Any, curvatures: Given, state: tuple[Stacks, ...]) -> tuple[Stacks, ...]:
    stacks, count, period, refresh = shared
    curvatures = made(curvatures)
    sizes = [-(-len(curvature) // period) for curvature in curvatures]
    turns = [-(-len(curvature) // size) for curvature, size in zip(curvatures, sizes, strict=True)]
    begins = itertools.accumulate(turns, initial=0)  # so that stacks of few turns have them at different steps

    def refreshed(stack: Stack, given: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[Any, ...]:
        curvature, size, turns, begin = given
        index = (count - begin) % period
        turn = functools.partial(_turn, of_stack(refresh, stack), size, curvature, index)
        return turn(old) if turns == period else jax.lax.cond(index < turns, turn, lambda old: old, old)

    return each_stack(refreshed, stacks, tuple(zip(curvatures, sizes, turns, begins, strict=False)), state)


def _turn(
    refresh_stack: Callable[..., Any], size: int, curvature: jax.Array, index: jax.Array | int, old: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Returns a stack's state after the index-th turn, of `size` blocks; the last turn has what is left."""
    length = len(curvature)
    if size == length:
        return refresh_stack(curvature, *old)
    first = jnp.minimum(index * size, length - size)
    rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
    before = jax.tree.map(rows, old)
    after = refresh_stack(rows(curvature), *before)
    if length % size:
        is_due = first + jnp.arange(size) >= index * size  # others had an earlier turn
        after = jax.tree.map(functools.partial(jax.vmap(jnp.where), is_due), after, before)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
    return jax.tree.map(write, old, after)

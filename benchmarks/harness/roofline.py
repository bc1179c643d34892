"""The least time that a step can take here: its products at the rate of such products, its bytes at that of a copy."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import rootfree_optax as rf
from harness import machine


def _in_a_row() -> int:
    """Returns how many operations are timed at once: how long one takes to reach an accelerator is no rate of its."""
    return 10 if machine.on_accelerator() else 1


def _fastest(function: Callable[..., Any], *arguments: Any, repeats: int = 7) -> float:
    calls, seconds = _in_a_row(), []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)  # of which the last alone is held
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


@jax.jit
def _products(lefts: list[jax.Array], right: jax.Array) -> list[jax.Array]:
    return [jnp.matmul(left, right) for left in lefts]


@functools.cache
def product_rate(shape: tuple[int, int, int], dtype: DTypeLike) -> float:
    """Returns the operations per second of the fastest of some products [n, rows, d] · [n, d, d] of a dtype."""
    count, rows, dim = shape
    # Numbers that differ: of equal ones an accelerator's products are faster.
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape).astype(dtype)
    # Of one program, as an optimizer's are: small ones take less time than to be handed over one by one.
    lefts = [draw(seed, (count, rows, dim)) for seed in range(_in_a_row())]
    seconds = _fastest(_products, lefts, draw(-1, (count, dim, dim))) / len(lefts)
    return 2 * count * rows * dim**2 / seconds


@functools.cache
def copy_rate(size: int = 2**28) -> float:
    """Returns the bytes per second, read and written, of the fastest of some copies of `size` bytes."""
    array = jnp.ones(size // 4)
    return 2 * size / _fastest(jax.jit(lambda x: x + 1), array)


def floors(plan: rf.Plan, flops: rf.BlockFlops, *, dtype: DTypeLike, step_bytes: int) -> dict[str, float]:
    """Returns the least seconds of a step with refresh and of one without: the products' or the bytes', the larger.

    And what the products of the refresh alone take.

    Args:
      plan: whose blocks say which products are made.
      flops: of all blocks, see `rf.describe`; every step observes.
      dtype: of the factors.
      step_bytes: what any step reads and writes: parameters, gradients and state.
    """
    rate = _mean_rate(plan, dtype)
    plain = (flops.observe + flops.precondition) / rate
    refreshing = flops.refresh / rate
    moved = step_bytes / copy_rate()
    return {
        "refresh_floor_seconds": max(plain + refreshing, moved),
        "plain_floor_seconds": max(plain, moved),
        "refresh_products_seconds": refreshing,
    }


def _mean_rate(plan: rf.Plan, dtype: DTypeLike) -> float:
    """Returns the operations per second of applying one factor along the longest dense axis of every block."""
    operations = seconds = 0.0
    for stack in plan.stacks:
        size = math.prod(stack.shape)
        # The product of two diagonal factors takes as many operations as they have entries.
        widest = max((s.dim for s in stack.structures if s.flops(1).matmul > s.dim), default=None)
        if widest is None:
            continue
        rows = size // widest if size > widest else widest
        work = 2 * stack.count * size * widest
        operations += work
        seconds += work / product_rate((stack.count, rows, widest), dtype)
    return operations / seconds if seconds else math.inf

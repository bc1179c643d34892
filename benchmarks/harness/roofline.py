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


def floors(plan: rf.Plan, *, dtype: DTypeLike, cached: bool, step_bytes: int) -> dict[str, float]:
    """Returns the least seconds of a step with refresh and of one without: the products' or the bytes', the larger.

    And what the products of the refresh alone take.

    Args:
      plan: whose operations are counted.
      dtype: of the factors.
      cached: whether K Kᵀ is kept.
      step_bytes: what any step reads and writes: parameters, gradients, momentum and factors.
    """
    seconds = {"refresh": 0.0, "plain": 0.0}
    refreshing = 0.0
    for stack in plan.stacks:
        size = math.prod(stack.shape)
        widest = max((s.dim for s in stack.structures if s.flops(1).matmul > s.dim), default=None)
        if widest is None:  # diagonal factors: no product
            continue
        rate = product_rate((stack.count, max(size // widest, 1) if size > widest else widest, widest), dtype)
        apply = stack.apply_flops // 2 if cached else stack.apply_flops
        refresh = stack.refresh_flops + (stack.square_flops if cached else 0)
        seconds["plain"] += apply / rate
        seconds["refresh"] += (apply + refresh) / rate
        refreshing += refresh / rate
    moved = step_bytes / copy_rate()
    return {
        **{f"{kind}_floor_seconds": max(value, moved) for kind, value in seconds.items()},
        "refresh_products_seconds": refreshing,
    }

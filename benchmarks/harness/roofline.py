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
from rootfree_optax.products import matmul


def _fastest(function: Callable[..., Any], *arguments: Any, repeats: int = 7) -> float:
    # An accelerator is handed some calls at once: how long a call takes to reach it is none of its rates.
    calls = 10 if machine.on_accelerator() else 1
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


@functools.cache
def product_rate(shape: tuple[int, int, int], dtype: DTypeLike) -> float:
    """Returns the operations per second of the fastest of some products [n, rows, d] · [n, d, d] of a dtype."""
    count, rows, dim = shape
    multiply = jax.jit(functools.partial(matmul, precision=None))
    # Numbers that differ: of equal ones an accelerator's products are faster.
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape).astype(dtype)
    seconds = _fastest(multiply, draw(0, (count, rows, dim)), draw(1, (count, dim, dim)))
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

"""Steps of several optimizers, timed in turn: so a slow minute of the machine slows all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from harness import machine

Seconds = tuple[float, float]
Step = Callable[[int], Seconds]
"""Makes so many steps, then waits for the device, and returns the seconds by the clock and of CPU time for all."""


def timed(run: Callable[[Any], Any], carry: Any) -> Step:
    """Returns a step of a function carry -> carry, of which every call gets what the last one returned."""

    def step(count: int) -> Seconds:
        nonlocal carry
        start, process_start = time.perf_counter(), time.process_time()
        for _ in range(count):
            carry = run(carry)
        jax.block_until_ready(carry)
        return time.perf_counter() - start, time.process_time() - process_start

    return step


def take_turns(
    steps: Mapping[str, Step], periods: int, period: int, watch: Callable[[Iterable[int]], Iterable[int]] = iter
) -> dict[str, list[list[Seconds]]]:
    """Returns each method's times, [periods][period].

    On a processor the methods take turns step by step. An accelerator is handed many steps before it has made the
    first, so there they do so period by period: a period in one go, then the steps of another but its first. The
    difference is the time of that one. Steps without periods, of 1, are waited for there, too.

    Args:
      steps: by name.
      periods: how many are timed, after one that is not.
      period: steps from one refresh to the next.
      watch: wraps the iterable of steps, for a progress bar.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    in_a_row = machine.on_accelerator() and period > 1
    for _ in watch(range((1 + periods) * (1 if in_a_row else period))):
        shuffle(order)
        for name in order:
            times[name] += _of_a_period(steps[name], period) if in_a_row else [steps[name](1)]
    of_period = lambda seconds, index: seconds[index * period : (index + 1) * period]
    return {name: [of_period(all_of, 1 + index) for index in range(periods)] for name, all_of in times.items()}


def _of_a_period(step: Step, period: int) -> list[Seconds]:
    whole = step(period)
    step(1)
    rest = step(period - 1)
    first = (whole[0] - rest[0], whole[1] - rest[1])
    return [first, *[(rest[0] / (period - 1), rest[1] / (period - 1))] * (period - 1)]


def summary(times: list[list[Seconds]]) -> dict[str, float]:
    """Returns medians over the periods: of the mean step, of the slowest, and of those with and without refresh.

    A period's first step is the one with refresh, if there is one.
    """
    clock = [[seconds for seconds, _ in period] for period in times]
    return {
        "mean_seconds": statistics.median(map(statistics.mean, clock)),
        "max_seconds": statistics.median(map(max, clock)),
        "median_seconds": statistics.median(seconds for period in clock for seconds in period),
        "refresh_seconds": statistics.median(period[0] for period in clock),
        "plain_seconds": statistics.median(seconds for period in clock for seconds in period[1:]),
        "mean_process_seconds": statistics.median(statistics.mean(s for _, s in period) for period in times),
    }

"""Times several steps alternately within one run, so that a slow minute of the machine slows all of them alike."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call of a step, over all rounds.

    The median is what a user meets on this machine, the fastest call what the step costs when nothing else runs, and
    the quartiles say how far apart the two may be trusted.
    """

    median: float
    fastest: float
    lower_quartile: float
    upper_quartile: float

    def seconds(self) -> dict[str, float]:
        """Returns the four, each name with its unit, ready for a record."""
        return {f"{name}_seconds": value for name, value in vars(self).items()}


def alternate(
    steps: Mapping[str, Callable[[Any], Any]],
    carries: Mapping[str, Any],
    *,
    repeats: int,
    warmup: int = 2,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Timing]:
    """Runs every step once per round, in an order drawn anew for each round, and returns each step's timing.

    Args:
      steps: by name, functions carry -> carry. A carry may be donated.
      carries: by the same names, the first carries.
      repeats: timed rounds, at least 2.
      warmup: rounds before them that are not counted.
      watch: wraps the iterable of rounds, for a progress bar.

    Returns:
      The timings, by name, in the order of `steps`.

    Raises:
      ValueError: for fewer than 2 repeats, which have no quartiles.
    """
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, got {repeats}.")
    carries = dict(carries)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in watch(range(warmup + repeats)):
        shuffle(order)
        for name in order:
            carry = carries.pop(name)
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](carry))
            seconds[name].append(time.perf_counter() - start)
    return {name: _summarise(values[warmup:]) for name, values in seconds.items()}


def _summarise(seconds: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median=median, fastest=min(seconds), lower_quartile=lower, upper_quartile=upper)

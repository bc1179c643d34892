"""Steps of several optimizers, timed in turn: so a slow minute of the machine slows all of them alike."""

import random
import statistics
from collections.abc import Callable, Iterable, Mapping

Step = Callable[[], tuple[float, float]]
Seconds = tuple[float, float]


def take_turns(
    steps: Mapping[str, Step], periods: int, period: int, watch: Callable[[Iterable[int]], Iterable[int]] = iter
) -> dict[str, list[list[Seconds]]]:
    """Returns each method's times, [periods][period]; the order is drawn anew for each step.

    Args:
      steps: by name, functions that make a step and return its seconds by the clock and of CPU time.
      periods: how many are timed, after one that is not.
      period: steps from one refresh to the next.
      watch: wraps the iterable of steps, for a progress bar.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in watch(range(period * (1 + periods))):
        shuffle(order)
        for name in order:
            times[name].append(steps[name]())
    of_period = lambda seconds, index: seconds[index * period : (index + 1) * period]
    return {name: [of_period(all_of, 1 + index) for index in range(periods)] for name, all_of in times.items()}


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

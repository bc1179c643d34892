"""One pair of a task and an optimizer: a random search, its finalists, then fresh seeds of the best and of defaults."""

import operator
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from searching import Settings, rows

from experiments.methods import Candidate
from experiments.tasks import Task
from experiments.training import Outcome, train_together

FIRST_SEED = 1000  # of the search; the seeds that are reported are others, from zero
AT_ONCE = 16
DIGITS = 5


class Runner:
    """Trains settings from seeds, a few side by side by one program, and keeps the time."""

    def __init__(self, task: Task, method: Candidate, at_once: int = AT_ONCE):
        self.task, self.method, self.at_once = task, method, at_once
        self.data = task.load()
        self.seconds: list[float] = []  # of each call of the program; the first one compiles

    def __call__(self, settings: Settings, seeds: np.ndarray) -> Outcome:
        """Returns outcomes [runs, …] of settings [runs] and seeds [runs]."""
        settings = dict(settings) | {name: np.full(len(seeds), value) for name, value in self.method.fixed.items()}
        parts = []
        for first in range(0, len(seeds), self.at_once):
            together = np.arange(first, first + self.at_once) % len(seeds)  # filled up: one program for all
            hyperparameters = {name: jnp.asarray(values[together], jnp.float32) for name, values in settings.items()}
            begin = time.perf_counter()
            outcome = train_together(self.task, self.method, hyperparameters, jnp.asarray(seeds[together]), self.data)
            parts.append(jax.tree.map(np.asarray, jax.block_until_ready(outcome)))
            self.seconds.append(time.perf_counter() - begin)
        return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(seeds)], *parts)

    def of_seeds(self, settings: Settings, seeds: range) -> Outcome:
        """Returns outcomes [settings, seeds, …] of every setting from every seed."""
        count = len(next(iter(settings.values())))
        setting, seed = (pairs.ravel() for pairs in np.indices((count, len(seeds))))
        outcome = self({name: values[setting] for name, values in settings.items()}, np.array(seeds)[seed])
        return jax.tree.map(lambda array: array.reshape(count, len(seeds), *array.shape[1:]), outcome)


def ranking(task: Task, outcome: Outcome) -> np.ndarray:
    """Returns the settings' indices, best first, by what the task reports on validation data; NaN comes last."""
    error, loss = (array[..., -1].mean(axis=1) for array in (outcome.validation_error, outcome.validation_loss))
    return np.lexsort((loss, error)) if task.reported == "error" else np.lexsort((error, loss))


def run_pair(
    task: Task, method: Candidate, trials: int, finalists: int, final_seeds: int, fresh_seeds: int
) -> dict[str, Any]:
    """Returns the record of a pair, as JSON can hold it; a number that is not finite is None."""
    begin = time.perf_counter()
    run = Runner(task, method)
    settings = method.draw(trials)
    outcome = run.of_seeds(settings, range(FIRST_SEED, FIRST_SEED + 1))
    searched = time.perf_counter() - begin
    best = ranking(task, outcome)[:finalists]
    final_settings = {name: values[best] for name, values in settings.items()}
    more = run.of_seeds(final_settings, range(FIRST_SEED + 1, FIRST_SEED + 1 + final_seeds))
    final = jax.tree.map(lambda first, others: np.concatenate([first[best], others], axis=1), outcome, more)
    chosen = int(best[ranking(task, final)[0]])
    chosen_settings = {name: values[[chosen]] for name, values in settings.items()}
    tested = jax.tree.map(operator.itemgetter(0), run.of_seeds(chosen_settings, range(fresh_seeds)))
    defaults = run_defaults(run, fresh_seeds)
    steady = min(run.seconds[1:])
    return {
        "fixed": dict(method.fixed),
        "chosen": {name: float(values[0]) for name, values in chosen_settings.items()},
        "non_finite": int(np.sum(~np.isfinite(outcome.validation_loss[..., -1]))),
        "seconds": time.perf_counter() - begin,
        "seconds_to_compile": run.seconds[0] - steady,
        "trials_per_minute": 60 * trials / searched,
        "milliseconds_per_step": 1e3 * steady / run.at_once / task.steps,
        "tested": numbers(tested),
        "defaults": defaults,
        "finalists": rows(final_settings, last(final)),
        "trials": rows(settings, last(outcome)),
    }


def run_defaults(run: Runner, fresh_seeds: int) -> list[dict[str, Any]]:
    """Returns what the method's defaults reach at each learning rate, from the fresh seeds."""
    untuned = run.method.untuned()
    outcome = run.of_seeds(untuned, range(fresh_seeds))
    return [
        {"learning_rate": float(rate), **numbers(jax.tree.map(operator.itemgetter(row), outcome))}
        for row, rate in enumerate(untuned["learning_rate"])
    ]


def last(outcome: Outcome) -> dict[str, np.ndarray]:
    """Returns what was measured at the end, [settings, seeds]."""
    curves = ("train_loss", "validation_error", "validation_loss")
    return {name: values[..., -1] if name in curves else values for name, values in outcome._asdict().items()}


def numbers(outcome: Outcome) -> dict[str, Any]:
    """Returns the outcomes as lists of rounded numbers."""

    def rounded(values: Any) -> Any:
        if np.ndim(values):
            return [rounded(value) for value in values]
        return round(float(values), DIGITS) if np.isfinite(values) else None

    return {name: rounded(values) for name, values in outcome._asdict().items()}

"""Trials of one optimizer: trained one after the other by the same compiled program, and the best one chosen."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import Progress
from searching import Hyperparameters, Settings, rows

from characters.corpus import Corpus
from characters.training import SEGMENT, Run, initial_params, start, train_segment, validate

FIRST_SEED = 1000  # the seeds of the chosen setting are others, from zero


class Curves(NamedTuple):
    """What one run measured; one that diverged has NaN from there on."""

    train_loss: np.ndarray  # means over every few steps
    validation_loss: np.ndarray  # after every segment if asked for, else after the last alone
    seconds: float


class Budget(NamedTuple):
    """How much a search may train."""

    steps: int
    trials: int
    finalists: int
    final_seeds: int


def train(
    run: Run, data: Corpus, steps: int, hyperparameters: Hyperparameters, seed: int, *, every_segment: bool = False
) -> Curves:
    """Trains from one seed and returns the curves."""
    begin = time.perf_counter()
    hyperparameters = of_one_type(hyperparameters)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    state = start(run, hyperparameters, initial_params(run.network, init_key))
    train_loss, validation_loss = [], []
    for first in range(0, steps, SEGMENT):
        state, losses = train_segment(run, hyperparameters, steps, first, data_key, data.train, state)
        train_loss.append(losses)
        if every_segment or first + SEGMENT == steps:
            validation_loss.append(validate(run.network, state.params, data.validation))
        if not np.isfinite(losses).all():
            break
    segments = steps // SEGMENT
    return Curves(
        padded(np.concatenate(train_loss), segments * len(train_loss[0])),
        padded(np.array(validation_loss), segments if every_segment else 1),
        time.perf_counter() - begin,
    )


def of_one_type(hyperparameters: Hyperparameters) -> dict[str, np.float32]:
    """Returns the hyperparameters as float32: numbers of Python would compile another program."""
    return {name: np.float32(value) for name, value in hyperparameters.items()}


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """Returns the values with NaN behind them."""
    return np.pad(values.astype(np.float64), (0, length - len(values)), constant_values=np.nan)


def measure(
    run: Run, data: Corpus, steps: int, settings: Settings, seeds: Iterable[int], bar: Progress, description: str
) -> tuple[np.ndarray, list[float]]:
    """Trains every trial from every seed; returns final validation losses, [trials, seeds], and seconds by run."""
    trials = len(next(iter(settings.values())))
    seeds = list(seeds)
    losses, seconds = np.full((trials, len(seeds)), np.nan), []
    task = bar.add_task(description, total=losses.size, status="")
    for trial in range(trials):
        for column, seed in enumerate(seeds):
            hyperparameters = {name: values[trial] for name, values in settings.items()}
            curves = train(run, data, steps, hyperparameters, seed)
            losses[trial, column] = curves.validation_loss[-1]
            seconds.append(curves.seconds)
            bar.update(
                task, advance=1, status=f"loss {losses[trial, column]:.3f}, best {np.nanmin(losses, initial=9):.3f}"
            )
    return losses, seconds


def choose(run: Run, data: Corpus, budget: Budget, bar: Progress) -> dict[str, Any]:
    """Returns the record of a random search: all trials, the finalists and the chosen setting."""
    settings = run.method.draw(budget.trials)
    losses, seconds = measure(run, data, budget.steps, settings, [FIRST_SEED], bar, run.method.label)
    best = losses.mean(axis=1).argsort()[: budget.finalists]  # NaN comes last
    best_settings = {name: values[best] for name, values in settings.items()}
    more_seeds = range(FIRST_SEED + 1, FIRST_SEED + 1 + budget.final_seeds)
    more, _ = measure(run, data, budget.steps, best_settings, more_seeds, bar, "its finalists")
    final_losses = np.concatenate([losses[best], more], axis=1)
    winner = final_losses.mean(axis=1).argsort()[0]
    return {
        "chosen": {name: float(values[winner]) for name, values in best_settings.items()},
        "non_finite": int(np.sum(~np.isfinite(losses))),
        "seconds_of_first_trial": seconds[0],
        "median_seconds_of_trials": float(np.median(seconds[1:] or seconds)),
        "finalists": rows(best_settings, {"validation_loss": final_losses}),
        "trials": rows(settings, {"validation_loss": losses}),
    }


def finite(value: float) -> float | None:
    """Returns a number to five decimals, or None if it is not finite."""
    return round(float(value), 5) if np.isfinite(value) else None

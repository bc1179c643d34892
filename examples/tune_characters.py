"""Chooses hyperparameters of the character transformer by random search, with the same budget for every optimizer.

    python examples/tune_characters.py
    python examples/tune_characters.py --optimizer sirf_exact --trials 32 --width 64

Every trial is trained from one seed, the best few from some more; among these the lowest mean validation loss wins,
and its setting is trained from fresh seeds, whose curves are kept. A trial that diverges counts as one. All trials of
an optimizer run the same compiled program, which is possible because every hyperparameter may be a traced array.
"""

import argparse
import pathlib
import platform
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import reporting
from characters import corpus
from characters.corpus import Corpus
from characters.methods import METHODS, RESULTS
from characters.training import SEGMENT, SEQUENCE, Run, start, train_segment, validate
from rich.progress import Progress
from searching import Hyperparameters, Settings, rows, to_json

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
    fresh_seeds: int


def train(
    run: Run, data: Corpus, steps: int, hyperparameters: Hyperparameters, seed: int, *, every_segment: bool = False
) -> Curves:
    """Trains from one seed and returns the curves."""
    begin = time.perf_counter()
    hyperparameters = {name: np.float32(value) for name, value in hyperparameters.items()}  # one type, one program
    init_key, data_key = jax.random.split(jax.random.key(seed))
    state = start(run, hyperparameters, init_key)
    train_loss, validation_loss = [], []
    for first in range(0, steps, SEGMENT):
        state, losses = train_segment(run, hyperparameters, steps, first, data_key, data.train, state)
        train_loss.append(losses)
        if every_segment or first + SEGMENT == steps:
            validation_loss.append(validate(run, state.params, data.validation))
        if not np.isfinite(losses).all():
            break
    segments = steps // SEGMENT
    return Curves(
        padded(np.concatenate(train_loss), segments * len(train_loss[0])),
        padded(np.array(validation_loss), segments if every_segment else 1),
        time.perf_counter() - begin,
    )


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


def search(run: Run, data: Corpus, budget: Budget) -> dict[str, Any]:
    """Returns the record of a search: all trials, the finalists, the chosen setting and its curves."""
    settings = run.method.draw(budget.trials)
    with reporting.progress_bar() as bar:
        losses, seconds = measure(run, data, budget.steps, settings, [FIRST_SEED], bar, run.method.label)
        best = losses.mean(axis=1).argsort()[: budget.finalists]  # NaN comes last
        best_settings = {name: values[best] for name, values in settings.items()}
        more_seeds = range(FIRST_SEED + 1, FIRST_SEED + 1 + budget.final_seeds)
        more, _ = measure(run, data, budget.steps, best_settings, more_seeds, bar, "its finalists")
        final_losses = np.concatenate([losses[best], more], axis=1)
        winner = final_losses.mean(axis=1).argsort()[0]
        chosen = {name: float(values[winner]) for name, values in best_settings.items()}
        task = bar.add_task("its fresh seeds", total=budget.fresh_seeds, status="")
        curves = []
        for seed in range(budget.fresh_seeds):
            curves.append(train(run, data, budget.steps, chosen, seed, every_segment=True))
            bar.update(task, advance=1, status=f"loss {curves[-1].validation_loss[-1]:.3f}")
    return {
        "chosen": chosen,
        "non_finite": int(np.sum(~np.isfinite(losses))),
        "seconds_of_first_trial": seconds[0],
        "median_seconds_of_trials": float(np.median(seconds[1:] or seconds)),
        "validation_loss": [finite(curve.validation_loss[-1]) for curve in curves],
        "finalists": rows(best_settings, {"validation_loss": final_losses}),
        "trials": rows(settings, {"validation_loss": losses}),
        "train_curves": [[finite(value) for value in curve.train_loss] for curve in curves],
        "validation_curves": [[finite(value) for value in curve.validation_loss] for curve in curves],
    }


def finite(value: float) -> float | None:
    """Returns a number to five decimals, or None if it is not finite."""
    return round(float(value), 5) if np.isfinite(value) else None


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--optimizer", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--trials", type=int, default=32, help="of one seed each")
    parser.add_argument("--finalists", type=int, default=4, help="trials that get more seeds")
    parser.add_argument("--final-seeds", type=int, default=2, help="how many more")
    parser.add_argument("--fresh-seeds", type=int, default=5, help="of the chosen setting")
    parser.add_argument("--steps", type=int, default=600, help=f"a multiple of {SEGMENT}")
    parser.add_argument("--batch-size", type=int, default=32, help=f"sequences of {SEQUENCE} characters")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", default=RESULTS, help="NAME.json goes there")
    options = parser.parse_args(arguments)
    if options.steps % SEGMENT:
        parser.error(f"--steps must be a multiple of {SEGMENT}, got {options.steps}")

    data = corpus.load(SEQUENCE)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.optimizer:
        begin = time.perf_counter()
        run = Run(METHODS[name], options.width, options.layers, options.batch_size)
        budget = Budget(*(getattr(options, field) for field in Budget._fields))
        record = {"optimizer": name, "python": platform.python_version(), "train_characters": data.train.size}
        record |= {key: getattr(options, key) for key in ("width", "layers", "batch_size")} | budget._asdict()
        record["ranges"] = {key: str(limits) for key, limits in METHODS[name].ranges.items()}
        record |= search(run, data, budget)
        (options.output / f"{name}.json").write_text(to_json(record))
        reporting.print_search(METHODS[name], record, time.perf_counter() - begin)


if __name__ == "__main__":
    main()

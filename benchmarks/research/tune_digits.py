"""Chooses hyperparameters for train_digits.py by random search on the validation split, with one budget for all.

    PYTHONPATH=examples python benchmarks/research/tune_digits.py
    PYTHONPATH=examples python benchmarks/research/tune_digits.py --methods rf_rmsprop

Every trial is trained from a few seeds, the best few trials from some more; among these the lowest mean validation
error wins. A trial that diverges counts as one. Many runs train side by side as one `jax.vmap`ped program, which is
possible because every hyperparameter may be a traced array. The record goes to results/, the chosen numbers are written
by hand into examples/digits/methods.py.
"""

import argparse
import functools
import operator
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import progress
from digits import data, training
from flax import nnx
from methods import METHODS
from rich.progress import Progress
from searching import Method, Outcomes, Settings, print_search, rows, to_json

FIRST_SEED = 1000  # the seeds that train_digits.py reports are others
AT_ONCE = 32

Program = Callable[[dict[str, jax.Array], nnx.State, jax.Array], dict[str, jax.Array]]


def program_of(method: Method, digits: data.ImageData, epochs: int) -> Program:
    """Returns the function that trains from many hyperparameters, initial parameters and keys, side by side."""
    steps = epochs * (len(digits.train.labels) // training.BATCH_SIZE)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None))
    def train(
        hyperparameters: dict[str, jax.Array],
        params: nnx.State,
        key: jax.Array,
        split: data.Split,
        held_out: data.Split,
    ) -> dict[str, jax.Array]:
        optimizer = method.optimizer(hyperparameters, steps, training.BATCH_SIZE)
        state = training.TrainingState(params, optimizer.init(params))
        epoch = lambda state, number: training.train_epoch(optimizer, key, number, split, state)
        state, losses = jax.lax.scan(epoch, state, jnp.arange(epochs))
        final = training.evaluate(held_out, state.params)
        return {"train_loss": losses[-1], "validation_error": final.error, "validation_loss": final.loss}

    return lambda hyperparameters, params, keys: train(hyperparameters, params, keys, digits.train, digits.validation)


def measure(program: Program, settings: Settings, seeds: range, bar: Progress, description: str) -> Outcomes:
    """Trains every trial from every seed and returns final training loss, validation error and validation loss."""
    trials = len(next(iter(settings.values())))
    trial, seed = (pairs.ravel() for pairs in np.indices((trials, len(seeds))))
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    initial = jax.jit(lambda keys: jax.lax.map(training.init_params, keys))(keys)
    task = bar.add_task(description, total=len(trial), status="runs")
    parts = []
    for first in range(0, len(trial), AT_ONCE):
        together = np.arange(first, first + AT_ONCE) % len(trial)  # the last part is filled up: one program for all
        hyperparameters = {name: jnp.asarray(values[trial[together]]) for name, values in settings.items()}
        params = jax.tree.map(operator.itemgetter(seed[together]), initial)
        parts.append(jax.block_until_ready(program(hyperparameters, params, keys[seed[together]])))
        bar.update(task, completed=min(first + AT_ONCE, len(trial)))
    joined = {name: np.concatenate([part[name] for part in parts])[: len(trial)] for name in parts[0]}
    return {name: values.reshape(trials, len(seeds)) for name, values in joined.items()}


def search(
    method: Method, digits: data.ImageData, epochs: int, trials: int, seeds: int, finalists: int, final_seeds: int
) -> dict[str, Any]:
    """Returns the record of a search: all trials, the finalists, and the chosen settings."""
    settings = method.draw(trials)
    first_seeds = range(FIRST_SEED, FIRST_SEED + seeds)
    more_seeds = range(FIRST_SEED + seeds, FIRST_SEED + seeds + final_seeds)
    program = program_of(method, digits, epochs)
    with progress.progress_bar() as bar:
        outcomes = measure(program, settings, first_seeds, bar, method.label)
        best = ranking(outcomes)[:finalists]
        best_settings = {name: values[best] for name, values in settings.items()}
        more = measure(program, best_settings, more_seeds, bar, "its finalists")
    final_outcomes = {name: np.concatenate([outcomes[name][best], more[name]], axis=1) for name in outcomes}
    winner = int(ranking(final_outcomes)[0])
    return {
        "chosen": {name: float(values[best[winner]]) for name, values in settings.items()},
        "validation_error": float(final_outcomes["validation_error"][winner].mean()),
        "non_finite": int(np.sum(~np.isfinite(outcomes["validation_loss"]).all(axis=1))),
        "finalists": rows(best_settings, final_outcomes),
        "trials": rows(settings, outcomes),
    }


def ranking(outcomes: Outcomes) -> np.ndarray:
    """Returns the trials' indices, best first: by mean validation error, equal ones by mean validation loss."""
    return np.lexsort((outcomes["validation_loss"].mean(axis=1), outcomes["validation_error"].mean(axis=1)))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4, help="of every trial")
    parser.add_argument("--finalists", type=int, default=8, help="trials that get more seeds")
    parser.add_argument("--final-seeds", type=int, default=24, help="how many more")
    parser.add_argument("--epochs", type=int, default=training.EPOCHS)
    default_output = pathlib.Path("results", "tune_digits")
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", default=default_output, help="(%(default)s)")
    options = parser.parse_args(arguments)

    budget = {key: getattr(options, key) for key in ("epochs", "trials", "seeds", "finalists", "final_seeds")}
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.methods:
        begin = time.perf_counter()
        record = {"method": name, "budget": budget}
        record["ranges"] = {key: str(limits) for key, limits in METHODS[name].ranges.items()}
        record |= search(METHODS[name], data.load(), **budget)
        (options.output / f"{name}.json").write_text(to_json(record))
        print_search(METHODS[name], record, time.perf_counter() - begin)


if __name__ == "__main__":
    main()

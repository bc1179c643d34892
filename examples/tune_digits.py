"""Chooses hyperparameters by random search on the validation split, with the same budget for every optimizer.

    python examples/tune_digits.py
    python examples/tune_digits.py --optimizer rf_rmsprop --output elsewhere

Every trial is trained from a few seeds, the best few trials from some more; among these the lowest mean validation
error wins. A trial that diverges counts as one. Many runs train side by side as one `jax.vmap`ped program, which is
possible because every hyperparameter may be a traced array.
"""

import argparse
import functools
import operator
import pathlib
import time
from collections.abc import Callable
from typing import Any

import image_data
import jax
import jax.numpy as jnp
import numpy as np
import reporting
from convnet import WIDTHS
from flax import nnx
from image_data import ImageData, Split
from methods import METHODS, RESULTS
from rich.progress import Progress
from searching import Outcomes, Settings, rows, to_json
from training import BATCH_SIZE, EPOCHS, Network, Run, initial_params, run_on, train

FIRST_SEED = 1000  # the seeds that train_digits.py reports are others
AT_ONCE = 32

Program = Callable[[dict[str, jax.Array], nnx.State, jax.Array], dict[str, jax.Array]]


def program_of(run: Run, data: ImageData) -> Program:
    """Returns the function that trains from many hyperparameters, initial parameters and keys, side by side."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None))
    def train_one(
        hyperparameters: dict[str, jax.Array], params: nnx.State, key: jax.Array, split: Split, validation: Split
    ) -> dict[str, jax.Array]:
        losses, final = train(run, hyperparameters, params, key, split, validation)
        return {"train_loss": losses[-1], "validation_error": final.error, "validation_loss": final.loss}

    return lambda hyperparameters, params, keys: train_one(hyperparameters, params, keys, data.train, data.validation)


def measure(
    program: Program, network: Network, settings: Settings, seeds: range, bar: Progress, description: str
) -> Outcomes:
    """Trains every trial from every seed and returns final training loss, validation error and validation loss."""
    trials = len(next(iter(settings.values())))
    trial, seed = (pairs.ravel() for pairs in np.indices((trials, len(seeds))))
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    initial = initial_params(network, keys)
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


def search(run: Run, data: ImageData, trials: int, seeds: int, finalists: int, final_seeds: int) -> dict[str, Any]:
    """Returns the record of a search: all trials, the finalists, and the chosen settings."""
    settings = run.method.draw(trials)
    first_seeds = range(FIRST_SEED, FIRST_SEED + seeds)
    more_seeds = range(FIRST_SEED + seeds, FIRST_SEED + seeds + final_seeds)
    program = program_of(run, data)
    with reporting.progress_bar() as bar:
        outcomes = measure(program, run.network, settings, first_seeds, bar, run.method.label)
        best = ranking(outcomes)[:finalists]
        best_settings = {name: values[best] for name, values in settings.items()}
        more = measure(program, run.network, best_settings, more_seeds, bar, "its finalists")
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
    parser.add_argument("--optimizer", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4, help="of every trial")
    parser.add_argument("--finalists", type=int, default=8, help="trials that get more seeds")
    parser.add_argument("--final-seeds", type=int, default=24, help="how many more")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="N", help="channels, by layer")
    parser.add_argument("--train-size", type=int, help="images to train on; 300 of the digits, all of CIFAR's")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder with CIFAR-10/100's files")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", default=RESULTS, help="NAME.json goes there")
    options = parser.parse_args(arguments)

    data = image_data.load(options.data, options.train_size)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.optimizer:
        begin = time.perf_counter()
        run = run_on(data, METHODS[name], options.epochs, options.batch_size, options.widths)
        record = {"optimizer": name, "data": data.name, "train_size": len(data.train.labels)}
        record |= {key: getattr(options, key) for key in ("epochs", "batch_size", "widths", "seeds", "final_seeds")}
        record["ranges"] = {key: str(limits) for key, limits in METHODS[name].ranges.items()}
        record |= search(run, data, options.trials, options.seeds, options.finalists, options.final_seeds)
        (options.output / f"{name}.json").write_text(to_json(record))
        reporting.print_search(METHODS[name], record, time.perf_counter() - begin)


if __name__ == "__main__":
    main()

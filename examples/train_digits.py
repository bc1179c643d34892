"""Trains a small convolutional network on handwritten digits (or CIFAR) with each optimizer at its tuned settings.

    python examples/train_digits.py
    python examples/train_digits.py --optimizer rf_rmsprop sgd --seeds 5
    python examples/train_digits.py --data cifar-10-batches-py --train-size 5000

The seeds of one optimizer train side by side, as one `jax.vmap`ped program. Prints a table; writes NAME.png (the
curves) and NAME.json (the table's numbers), NAME being digits, cifar10 or cifar100.
"""

import argparse
import functools
import json
import pathlib
import time

import image_data
import jax
import jax.numpy as jnp
import numpy as np
import reporting
from convnet import WIDTHS
from image_data import ImageData
from methods import METHODS, RESULTS, tuned_settings
from reporting import History
from rich.progress import Progress
from training import BATCH_SIZE, EPOCHS, Run, TrainingState, evaluate_seeds, initial_params, run_on, train_epoch

EVALUATIONS = 25


def train_seeds(run: Run, data: ImageData, hyperparameters: dict[str, float], seeds: int, bar: Progress) -> History:
    """Returns the curves of all seeds at these hyperparameters."""
    task = bar.add_task(run.method.label, total=run.epochs, status="compiling")
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    params = initial_params(run.network, keys)
    state = TrainingState(params, jax.jit(jax.vmap(run.optimizer(hyperparameters).init))(params))
    one_seed = functools.partial(train_epoch, run, hyperparameters)
    all_seeds = jax.jit(jax.vmap(one_seed, in_axes=(0, None, None, 0)), donate_argnums=3)
    one_epoch = all_seeds.lower(keys, jnp.int32(0), data.train, state).compile()

    losses, errors, evaluated, durations = [], [], [], []
    every = max(1, run.epochs // EVALUATIONS)
    for epoch in range(run.epochs):
        begin = time.perf_counter()
        state, loss = jax.block_until_ready(one_epoch(keys, jnp.int32(epoch), data.train, state))
        durations.append(time.perf_counter() - begin)
        losses.append(loss)
        if (run.epochs - epoch - 1) % every == 0:
            errors.append(evaluate_seeds(run.network, data.test, state.params).error)
            evaluated.append(run.steps_per_epoch * (epoch + 1))
            status = f"loss {losses[-1].mean():.4f}  error {100 * errors[-1].mean():.2f} %"
            bar.update(task, status=status)
        bar.advance(task)
    steps = run.steps_per_epoch * np.arange(1, run.epochs + 1)
    seconds_per_step = min(durations) / run.steps_per_epoch / seeds
    return History(steps, np.stack(losses), np.array(evaluated), np.stack(errors), seconds_per_step)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--optimizer", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="N", help="channels, by layer")
    parser.add_argument("--train-size", type=int, help="images to train on; 300 of the digits, all of CIFAR's")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder with CIFAR-10/100's files")
    parser.add_argument("--settings", type=pathlib.Path, metavar="DIR", default=RESULTS, help="tune_digits.py's output")
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", default=RESULTS)
    options = parser.parse_args(arguments)

    data = image_data.load(options.data, options.train_size)
    histories = {}
    with reporting.progress_bar() as bar:
        for name in options.optimizer:
            run = run_on(data, METHODS[name], options.epochs, options.batch_size, options.widths)
            histories[name] = train_seeds(run, data, tuned_settings(name, options.settings), options.seeds, bar)
    summary = reporting.summarize(histories)
    title = f"{data.name}: {len(data.train.labels)} training images, {options.seeds} seeds"
    caption = "± one standard deviation over seeds; the time is one seed's share of a step, in the fastest epoch"
    reporting.print_results(title, caption, summary)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{data.name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    reporting.draw_curves(options.output / f"{data.name}.png", f"{title} (mean and range)", histories)


if __name__ == "__main__":
    main()

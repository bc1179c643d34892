"""Trains a small convolutional network on handwritten digits: ours at AdamW's settings, beside tuned others.

    python examples/train_digits.py
    python examples/train_digits.py --methods sirf_muon adamw --seeds 5

The seeds of one method train side by side, as one `jax.vmap`ped program. It prints a table, and writes the table and a
figure of the curves to results/. All of it takes about three minutes on two processor cores.
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from digits import data, report, training
from digits.methods import METHODS, Method
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS = 13  # that a method takes, half of them to compile
EVALUATE_EVERY = 2  # epochs
PRINT_EVERY = 4  # epochs, where there is no terminal for a bar
console = Console(highlight=False)


def train_seeds(method: Method, digits: data.ImageData, seeds: int, epochs: int, bar: Progress) -> report.History:
    """Returns the curves of all seeds, [epochs, seeds]."""
    task = bar.add_task(method.label, total=epochs, status="compiling")
    steps_per_epoch = len(digits.train.labels) // training.BATCH_SIZE
    optimizer = method.optimizer(epochs * steps_per_epoch)

    @jax.jit
    def start(keys: jax.Array) -> training.TrainingState:
        params = jax.lax.map(training.init_params, keys)
        return training.TrainingState(params, jax.vmap(optimizer.init)(params))

    @functools.partial(jax.jit, donate_argnums=3)
    @functools.partial(jax.vmap, in_axes=(0, None, None, 0))
    def one_epoch(key: jax.Array, epoch: jax.Array, train: data.Split, state: training.TrainingState):
        return training.train_epoch(optimizer, key, epoch, train, state)

    evaluate = jax.jit(jax.vmap(training.evaluate, in_axes=(None, 0)))
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    state = start(keys)
    one_epoch = one_epoch.lower(keys, jnp.int32(0), digits.train, state).compile()
    losses, errors, evaluated, durations = [], [], [], []
    for epoch in range(epochs):
        begin = time.perf_counter()
        state, loss = jax.block_until_ready(one_epoch(keys, jnp.int32(epoch), digits.train, state))
        durations.append(time.perf_counter() - begin)
        losses.append(np.asarray(loss))
        if (epoch + 1) % EVALUATE_EVERY == 0 or epoch + 1 == epochs:
            errors.append(np.asarray(evaluate(digits.test, state.params)))
            evaluated.append(steps_per_epoch * (epoch + 1))
        error = f"{100 * errors[-1].mean():.2f} %" if errors else "–"
        status = f"loss {losses[-1].mean():.4f}, test error {error}"
        bar.update(task, advance=1, status=status)
        if not console.is_terminal and (epoch + 1) % PRINT_EVERY == 0:
            console.print(f"{method.label}: epoch {epoch + 1} of {epochs}, {status}")
    steps = steps_per_epoch * np.arange(1, epochs + 1)
    seconds_per_step = min(durations) / steps_per_epoch / seeds
    return report.History(steps, np.stack(losses), np.array(evaluated), np.stack(errors), seconds_per_step)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=training.EPOCHS)
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", default=pathlib.Path("results"))
    options = parser.parse_args(arguments)

    counts = ", ".join(
        f"{count} {noun}{'s' if count > 1 else ''}"
        for count, noun in ((len(options.methods), "method"), (options.seeds, "seed"))
    )
    console.print(f"{counts}: about {len(options.methods) * SECONDS} s on two processor cores")
    digits, histories, begin = data.load(), {}, time.perf_counter()
    columns = ("{task.description:23}", BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("{task.fields[status]}"), console=console, disable=not console.is_terminal)
    with bar:
        for name in options.methods:
            histories[name] = train_seeds(METHODS[name], digits, options.seeds, options.epochs, bar)
    summary = report.summarize(histories)
    title = f"{len(digits.train.labels)} training images, {histories[name].steps[-1]} steps, {options.seeds} seeds"
    caption = (
        "± one standard deviation over seeds. Steps to AdamW's final training loss. "
        "The time is one seed's share of a step, in the fastest epoch."
    )
    console.print(report.table(title, caption, summary))
    options.output.mkdir(parents=True, exist_ok=True)
    figure, table = options.output / "digits.png", options.output / "digits.md"
    report.draw_curves(figure, f"Digits: {title} (mean and range)", histories)
    table.write_text(report.markdown(title, summary), encoding="utf-8")
    console.print(f"It took {time.perf_counter() - begin:.0f} s. The figure is in {figure.absolute()}", soft_wrap=True)
    console.print(f"and the table in {table.absolute()}", soft_wrap=True)


if __name__ == "__main__":
    main()

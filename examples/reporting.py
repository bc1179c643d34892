"""What the examples show: progress bars, tables, the figure of the curves."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from methods import METHODS, Method
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

REFERENCE = "adamw"
COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#595959", "#009E73", "#CC79A7")  # told apart by the colour-blind, too
console = Console()


class History(NamedTuple):
    """The curves of one optimizer: one column per seed, one row per epoch or evaluation."""

    steps: np.ndarray  # at the end of each epoch
    train_loss: np.ndarray  # [epochs, seeds], the mean over the epoch's mini-batches
    evaluated_steps: np.ndarray
    test_error: np.ndarray  # [evaluations, seeds], in [0, 1]
    seconds_per_step: float  # one seed's share, in the fastest epoch


def progress_bar() -> Progress:
    """Returns a bar with a description, the count and the time; a task's `status` field is shown behind them."""
    columns = ("{task.description:17}", BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[status]}"), console=console)


def steps_to(history: History, loss: float) -> int | None:
    """Returns the first epoch's last step at which the seeds' mean training loss is at most `loss`."""
    reached = np.flatnonzero(history.train_loss.mean(axis=1) <= loss)
    return int(history.steps[reached[0]]) if reached.size else None


def summarize(histories: Mapping[str, History]) -> dict[str, dict[str, Any]]:
    """Returns the numbers of the results' table, by optimizer."""
    reference = histories.get(REFERENCE)
    summary = {}
    for name, history in histories.items():
        final = history.test_error[-1]
        summary[name] = {
            "test_error_mean": float(final.mean()),
            "test_error_std": float(final.std(ddof=1)) if final.size > 1 else 0.0,
            "train_loss": float(history.train_loss[-1].mean()),
            "steps": int(history.steps[-1]),
            "steps_to_reference_loss": reference and steps_to(history, float(reference.train_loss[-1].mean())),
            "seconds_per_step": history.seconds_per_step,
            "seeds": int(final.size),
        }
    return summary


def print_results(title: str, caption: str, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints one row per optimizer."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("test error %", "training\nloss", f"steps to\n{METHODS[REFERENCE].label}'s loss", "ms per\nstep"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in summary.items():
        reached = row["steps_to_reference_loss"]
        table.add_row(
            METHODS[name].label,
            f"{100 * row['test_error_mean']:.2f} ± {100 * row['test_error_std']:.2f}",
            f"{row['train_loss']:.2g}",
            "–" if reached is None else str(reached),
            f"{1e3 * row['seconds_per_step']:.2f}",
        )
    console.print(table)


def print_search(method: Method, record: Mapping[str, Any], seconds: float) -> None:
    """Prints the chosen settings beside the ranges they were drawn from."""
    title = f"{method.label}: {len(record['trials'])} trials, {record['non_finite']} non-finite, {seconds:.0f} s"
    table = Table("hyperparameter", "range", title=title, title_justify="left")
    table.add_column("chosen", justify="right")
    for name, limits in method.ranges.items():
        table.add_row(name, str(limits), f"{record['chosen'][name]:.4g}")
    if "validation_error" in record:
        table.add_row("validation error %", "", f"{100 * record['validation_error']:.2f}")
    if "validation_loss" in record:
        losses = np.array(record["validation_loss"], float)
        table.add_row("validation loss", "", f"{losses.mean():.3f}")
    console.print(table)


def draw_curves(path: pathlib.Path, title: str, histories: Mapping[str, History]) -> None:
    """Writes a PNG of training loss and test error over the steps: the mean over seeds, and their range as a band."""
    figure, (loss_axes, error_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, history in histories.items():
        color = COLORS[list(METHODS).index(name) % len(COLORS)]
        label = METHODS[name].label
        for axes, steps, values in (
            (loss_axes, history.steps, history.train_loss),
            (error_axes, history.evaluated_steps, 100 * history.test_error),
        ):
            axes.fill_between(steps, values.min(axis=1), values.max(axis=1), color=color, alpha=0.15, linewidth=0)
            axes.plot(steps, values.mean(axis=1), color=color, label=label)
    loss_axes.set(yscale="log", xlabel="step", title="Training loss")
    error_axes.set(yscale="log", xlabel="step", title="Test error, %")
    error_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    error_axes.yaxis.set_major_formatter("{x:g}")
    error_axes.yaxis.set_minor_formatter("")
    error_axes.legend(frameon=False)
    for axes in (loss_axes, error_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)

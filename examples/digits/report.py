"""What train_digits.py shows: the results' table and the figure of the curves."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from rich.table import Table

from digits.methods import METHODS

REFERENCE = "adamw"
COLUMNS = ("test\nerror, %", "training\nloss", f"steps to\n{METHODS[REFERENCE].label}'s", "ms per\nstep")


class History(NamedTuple):
    """The curves of one method: one column per seed, one row per epoch or evaluation."""

    steps: np.ndarray  # [epochs], at the end of each
    train_loss: np.ndarray  # [epochs, seeds], the mean over the epoch's mini-batches
    evaluated_steps: np.ndarray  # [evaluations]
    test_error: np.ndarray  # [evaluations, seeds], in [0, 1]
    seconds_per_step: float  # one seed's share, in the fastest epoch


def steps_to(history: History, loss: float) -> int | None:
    """Returns the first epoch's last step at which the seeds' mean training loss is at most `loss`."""
    reached = np.flatnonzero(history.train_loss.mean(axis=1) <= loss)
    return int(history.steps[reached[0]]) if reached.size else None


def summarize(histories: Mapping[str, History]) -> dict[str, dict[str, Any]]:
    """Returns the numbers of the results' table, by method."""
    reference, summary = histories.get(REFERENCE), {}
    for name, history in histories.items():
        final = history.test_error[-1]
        summary[name] = {
            "test_error_mean": float(final.mean()),
            "test_error_std": float(final.std(ddof=1)) if final.size > 1 else 0.0,
            "train_loss": float(history.train_loss[-1].mean()),
            "steps_to_reference_loss": reference and steps_to(history, float(reference.train_loss[-1].mean())),
            "seconds_per_step": history.seconds_per_step,
        }
    return summary


def row_of(name: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the cells of one method's row."""
    reached = numbers["steps_to_reference_loss"]
    return (
        METHODS[name].label,
        f"{100 * numbers['test_error_mean']:.2f} ± {100 * numbers['test_error_std']:.2f}",
        f"{numbers['train_loss']:.2g}",
        "–" if reached is None else str(reached),
        f"{1e3 * numbers['seconds_per_step']:.2f}",
    )


def table(title: str, caption: str, summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table for the terminal, one row per method."""
    result = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    result.add_column("method", no_wrap=True)
    for heading in COLUMNS:
        result.add_column(heading, justify="right", no_wrap=True)
    for name, numbers in summary.items():
        result.add_row(*row_of(name, numbers))
    return result


def markdown(title: str, summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the same table in Markdown."""
    headings = (title, *(heading.replace("\n", " ") for heading in COLUMNS))
    rows = [headings, ("---", *("---:" for _ in COLUMNS)), *(row_of(*item) for item in summary.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw_curves(path: pathlib.Path, title: str, histories: Mapping[str, History]) -> None:
    """Writes a PNG of training loss and test error over the steps: the mean over seeds, and their range as a band."""
    figure, (loss_axes, error_axes) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for name, history in histories.items():
        color = METHODS[name].color
        for axes, steps, values in (
            (loss_axes, history.steps, history.train_loss),
            (error_axes, history.evaluated_steps, 100 * history.test_error),
        ):
            axes.fill_between(steps, values.min(axis=1), values.max(axis=1), color=color, alpha=0.12, linewidth=0)
            axes.plot(steps, values.mean(axis=1), color=color, label=METHODS[name].label)
    loss_axes.set(yscale="log", xlabel="step", title="Training loss")
    error_axes.set(yscale="log", xlabel="step", title="Test error, %")
    error_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    error_axes.yaxis.set_major_formatter("{x:g}")
    error_axes.yaxis.set_minor_formatter("")
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    for axes in (loss_axes, error_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)

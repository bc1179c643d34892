"""The figures of what summary.json holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from experiments.tables import Summary, labels, scale_of

STYLES = {  # one colour a family, one dash a variant
    "sgd": ("#000000", "-"),
    "rmsprop": ("#999999", "--"),
    "adamw": ("#595959", "-"),
    "muon": ("#009E73", "-"),
    "rf_rmsprop": ("#E69F00", "-"),
    "rf_adamw": ("#E69F00", "--"),
    "rf_shampoo": ("#CC79A7", "-"),
    "sirf_shampoo": ("#0072B2", "-"),
    "sirf_bfloat16": ("#0072B2", ":"),
    "sirf_hierarchical": ("#56B4E9", "--"),
    "sirf_exact": ("#D55E00", "-"),
    "distributed_shampoo": ("#882255", "--"),
}


def panels(tasks: Mapping[str, Any], height: float) -> tuple[plt.Figure, list[plt.Axes]]:
    """Returns a figure with one panel per task, three in a row."""
    rows, columns = -(-len(tasks) // 3), min(3, len(tasks))
    figure, grid = plt.subplots(
        rows, columns, figsize=(4 * columns, height * rows), layout="constrained", squeeze=False
    )
    axes = list(grid.flat)
    for unused in axes[len(tasks) :]:
        unused.set_visible(False)
    for panel, task in zip(axes, tasks.values(), strict=False):
        panel.set_title(task["label"], fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, axes


def name_rows(panel: plt.Axes, names: Sequence[str], *, shown: bool) -> None:
    """Labels one row per method, the first at the top."""
    panel.set_yticks(range(len(names)), names if shown else [])
    panel.set_ylim(len(names) - 0.5, -0.5)


def draw_tests(summary: Summary) -> plt.Figure:
    """Draws what every tuned method reaches on test data: every seed, and the mean with its standard deviation."""
    figure, axes = panels(summary["tasks"], 3.4)
    names = labels(summary)
    for index, task in enumerate(summary["tasks"].values()):
        scale = scale_of(task)
        for row, name in enumerate(names):
            if name in task["methods"]:
                color, test = STYLES[name][0], task["methods"][name]["test"]
                seeds = scale * np.array(task["methods"][name]["seeds"], float)
                axes[index].plot(seeds, np.full(len(seeds), row), "|", color=color, alpha=0.5)
                axes[index].errorbar(
                    scale * test["mean"], row, xerr=scale * test["std"], color=color, fmt="o", markersize=4
                )
        axes[index].set_xlabel("test error, %" if scale == 100 else "test loss, nats per character")
        axes[index].set_xlim(left=max(0, axes[index].get_xlim()[0]))
        name_rows(axes[index], list(names.values()), shown=index % 3 == 0)
    return figure


def draw_curves(summary: Summary) -> plt.Figure:
    """Draws the validation curves of the tuned methods: means over seeds."""
    figure, axes = panels(summary["tasks"], 3)
    names = labels(summary)
    for panel, task in zip(axes, summary["tasks"].values(), strict=False):
        scale = scale_of(task)
        for name in (name for name in names if name in task["methods"]):
            curve = scale * np.array(task["methods"][name]["validation_curve"], float)
            steps = task["steps"] / len(curve) * np.arange(1, len(curve) + 1)
            color, dash = STYLES[name]
            panel.plot(steps, curve, dash, color=color, label=names[name], linewidth=1.3)
        panel.set(xlabel="step", yscale="log", ylabel="validation error, %" if scale == 100 else "validation loss")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if scale == 100 else (1, 2, 2.5, 3, 4)))
        panel.yaxis.set_minor_formatter("")
    handles = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_regrets(summary: Summary) -> plt.Figure:
    """Draws by how many per cent untuned settings exceed tuned ones, as a table of colours."""
    defaults, tasks, names = summary["defaults"], summary["tasks"], labels(summary)
    values = np.array(
        [[row["tasks"].get(task, {}).get("regret", np.nan) for task in tasks] for row in defaults.values()], float
    )
    figure, axes = plt.subplots(figsize=(2 + 1.5 * len(tasks), 1.5 + 0.4 * len(defaults)), layout="constrained")
    axes.imshow(100 * values, cmap="RdYlGn_r", vmin=-20, vmax=100, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        if not np.isnan(values[row, column]):
            axes.text(
                column,
                row,
                f"{100 * values[row, column]:+.0f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if values[row, column] > 0.8 else "black",
            )
    shown = [f"{names[name]}, lr {row['learning_rate']:.2g}" for name, row in defaults.items()]
    axes.set_yticks(range(len(shown)), shown)
    axes.set_xticks(range(len(tasks)), [task["label"].replace(", ", ",\n") for task in tasks.values()], fontsize=8)
    axes.set_title("Untuned against tuned: excess of the test error or loss, %", fontsize=10)
    return figure

"""The figures of the report."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from experiments.methods import METHODS
from experiments.summary import ABLATIONS, Records, label_of

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
    "rf_rmsprop_without_terms": ("#E69F00", ":"),
    "rf_rmsprop_from_zero": ("#E69F00", "-."),
}


def panels(records: Records, height: float) -> tuple[plt.Figure, list[plt.Axes]]:
    """Returns a figure with one panel per task, three in a row."""
    rows = -(-len(records) // 3)
    columns = min(3, len(records))
    figure, grid = plt.subplots(
        rows, columns, figsize=(4 * columns, height * rows), layout="constrained", squeeze=False
    )
    axes = list(grid.flat)
    for unused in axes[len(records) :]:
        unused.set_visible(False)
    for panel, task in zip(axes, records, strict=False):
        panel.set_title(label_of(task), fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, axes


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    """Writes a figure and closes it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)


def name_rows(panel: plt.Axes, names: Sequence[str], *, shown: bool) -> None:
    """Labels one row per method, the first at the top."""
    panel.set_yticks(range(len(names)), [METHODS[name].label for name in names] if shown else [])
    panel.set_ylim(len(names) - 0.5, -0.5)


def draw_tests(records: Records, summary: Mapping[str, Any]) -> plt.Figure:
    """Draws what every tuned method reaches on test data: every seed, and the mean with its standard deviation."""
    figure, axes = panels(records, 3.4)
    names = [name for name in STYLES if name not in ABLATIONS and any(name in row for row in records.values())]
    for index, (task, methods) in enumerate(records.items()):
        scale = 100 if next(iter(methods.values()))["reported"] == "error" else 1
        for row, name in enumerate(names):
            if name in methods:
                record, test = methods[name], summary["tasks"][task][name]["test"]
                seeds = scale * np.array(record["tested"][f"test_{record['reported']}"], float)
                axes[index].plot(seeds, np.full(len(seeds), row), "|", color=STYLES[name][0], alpha=0.5)
                axes[index].errorbar(
                    scale * test["mean"], row, xerr=scale * test["std"], color=STYLES[name][0], fmt="o", markersize=4
                )
        axes[index].set_xlabel("test error, %" if scale == 100 else "test loss, nats per character")
        axes[index].set_xlim(left=max(0, axes[index].get_xlim()[0]))
        name_rows(axes[index], names, shown=index % 3 == 0)
    return figure


def draw_curves(records: Records) -> plt.Figure:
    """Draws the validation curves of the tuned methods: means over seeds."""
    figure, axes = panels(records, 3)
    for panel, methods in zip(axes, records.values(), strict=False):
        for name in (name for name in STYLES if name in methods and name not in ABLATIONS):
            record = methods[name]
            scale = 100 if record["reported"] == "error" else 1
            curves = scale * np.array(record["tested"][f"validation_{record['reported']}"], float)
            steps = record["steps"] / curves.shape[1] * np.arange(1, curves.shape[1] + 1)
            color, dash = STYLES[name]
            panel.plot(steps, curves.mean(axis=0), dash, color=color, label=METHODS[name].label, linewidth=1.3)
        panel.set(xlabel="step", yscale="log", ylabel="validation error, %" if scale == 100 else "validation loss")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if scale == 100 else (1, 2, 2.5, 3, 4)))
        panel.yaxis.set_minor_formatter("")
    handles = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_trials(records: Records) -> plt.Figure:
    """Draws all trials of every search as points, their median as a bar; those that are not finite are counted."""
    figure, axes = panels(records, 3.6)
    names = [name for name in STYLES if any(name in row for row in records.values())]
    for index, methods in enumerate(records.values()):
        for row, name in ((names.index(name), name) for name in methods if name in names):
            record = methods[name]
            scale = 100 if record["reported"] == "error" else 1
            values = np.array([trial[f"validation_{record['reported']}"] for trial in record["trials"]], float)
            values = scale * np.where(np.isnan(values), np.inf, values)
            jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
            axes[index].plot(values, row + jitter, ".", color=STYLES[name][0], markersize=3, alpha=0.7)
            axes[index].plot([np.median(values)] * 2, [row - 0.4, row + 0.4], color=STYLES[name][0], linewidth=2)
        axes[index].set_xlabel("validation error of trials, %" if scale == 100 else "validation loss of trials")
        if scale == 1:
            axes[index].set_xlim(2, 6)  # the uniform distribution's loss is 4.6
        name_rows(axes[index], names, shown=index % 3 == 0)
    return figure


def draw_regrets(records: Records, summary: Mapping[str, Any]) -> plt.Figure:
    """Draws by how many per cent untuned settings exceed tuned ones, as a table of colours."""
    defaults = summary["defaults"]
    values = np.array(
        [[row["tasks"].get(task, {}).get("regret", np.nan) for task in records] for row in defaults.values()]
    )
    figure, axes = plt.subplots(figsize=(2 + 1.5 * len(records), 1.5 + 0.4 * len(defaults)), layout="constrained")
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
    labels = [f"{METHODS[name].label}, lr {row['learning_rate']:.2g}" for name, row in defaults.items()]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(len(records)), [label_of(task).replace(", ", ",\n") for task in records], fontsize=8)
    axes.set_title("Untuned against tuned: excess of the test error or loss, %", fontsize=10)
    return figure

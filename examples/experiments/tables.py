"""The report's tables, in Markdown."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.methods import METHODS
from experiments.summary import ABLATIONS, Records, label_of


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a table whose first column is text."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def by_task(records: Records, cell: Callable[[str, str], str], *, ablations: bool = False) -> str:
    """Returns a table of one row per method and one column per task."""
    names = [name for name in METHODS if any(name in methods for methods in records.values())]
    if not ablations:
        names = [name for name in names if name not in ABLATIONS]
    rows = [
        [METHODS[name].label, *(cell(task, name) if name in records[task] else "" for task in records)]
        for name in names
    ]
    return markdown(["", *(label_of(task) for task in records)], rows)


def report(records: Records, summary: Mapping[str, Any]) -> str:
    """Returns all tables, each under its heading."""
    tasks, defaults = summary["tasks"], summary["defaults"]

    def tested(task: str, name: str) -> str:
        scale = 100 if records[task][name]["reported"] == "error" else 1
        test = tasks[task][name]["test"]
        text = (
            f"{scale * test['mean']:.{2 if scale == 100 else 3}f} ± {scale * test['std']:.{2 if scale == 100 else 3}f}"
        )
        best = min(row["test"]["mean"] for other, row in tasks[task].items() if other not in ABLATIONS)
        text = f"**{text}**" if test["mean"] == best else text
        return f"{text} ({test['diverged']} diverged)" if test["diverged"] else text

    def speed(task: str, name: str) -> str:
        row = tasks[task][name]
        steps, seconds = row["steps_to_reference_loss"], row["seconds_to_reference_loss"]
        if steps is None:
            return "–"
        return str(steps) if seconds is None else f"{steps}, {seconds:.2f} s"

    def trials(task: str, name: str) -> str:
        scale = 100 if records[task][name]["reported"] == "error" else 1
        row = tasks[task][name]["trials"]
        values = " / ".join(
            "∞" if np.isinf(row[key]) else f"{scale * row[key]:.3g}" for key in ("best", "quartile", "median")
        )
        return f"{values} ({row['non_finite']})"

    def regret(task: str, name: str) -> str:
        if name not in defaults:
            return ""
        row = defaults[name]["tasks"][task]
        return "diverged" if not np.isfinite(row["regret"]) or row["diverged"] else f"{100 * row['regret']:+.0f} %"

    def one_setting(task: str, name: str) -> str:
        value = summary["one_setting"].get(name, {"tasks": {}})["tasks"].get(task, np.inf)
        return "diverged" if np.isinf(value) else f"{100 * value:+.0f} %"

    sizes = markdown(
        ["task", "parameters", "B", "steps"],
        [
            [label_of(task), *(str(next(iter(methods.values()))[key]) for key in ("parameters", "batch_size", "steps"))]
            for task, methods in records.items()
        ],
    )
    number = lambda value: "–" if np.isinf(value) else f"{value:.4g}"
    judged = markdown(
        ["aim", "task", "measured", "bound", "met"],
        [
            [
                row["what"],
                label_of(row["task"]),
                number(row["value"]),
                number(row["bound"]),
                "yes" if row["met"] else "no",
            ]
            for row in summary["goals"]
        ],
    )
    rates = ", ".join(f"{METHODS[name].label} {row['learning_rate']:.2g}" for name, row in defaults.items())
    return "\n".join(
        [
            "### Sizes\n",
            sizes,
            "### Test error, % (characters: loss): mean ± standard deviation over seeds\n",
            by_task(records, tested, ablations=True),
            "### Steps to AdamW's final loss, and seconds where all optimizers were timed by turns\n",
            by_task(records, speed),
            "### Trials: best / first quartile / median on validation data (not finite)\n",
            by_task(records, trials, ablations=True),
            "### Regret of the defaults\n",
            f"At one learning rate for all tasks: {rates}.\n",
            by_task(records, regret),
            "### Excess of the one trial that is best for all tasks\n",
            by_task(records, one_setting),
            "\n".join(
                f"- {METHODS[name].label}: " + ", ".join(f"{key} {value:.2g}" for key, value in row["settings"].items())
                for name, row in summary["one_setting"].items()
            )
            + "\n",
            "### Which hyperparameter decides: share of the trials' variance in rank, mean over tasks\n",
            "\n".join(
                f"- {METHODS[name].label}: "
                + ", ".join(
                    f"{key} {100 * value:.0f} %" for key, value in sorted(row.items(), key=lambda item: -item[1])
                )
                for name, row in summary["knobs"].items()
            )
            + "\n",
            "### Aims\n",
            judged,
        ]
    )

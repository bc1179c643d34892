"""The report's tables, in Markdown."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.methods import METHODS
from experiments.summary import ABLATIONS, Record, Records, label_of


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


def _scale(record: Record) -> int:
    """Returns what a reported number is shown times: errors are in per cent."""
    return 100 if record["reported"] == "error" else 1


def tested(records: Records, tasks: Mapping[str, Any], task: str, name: str) -> str:
    """Returns mean and deviation of the test errors, the best in bold, and how many seeds diverged."""
    scale, test = _scale(records[task][name]), tasks[task][name]["test"]
    digits = 2 if scale == 100 else 3
    text = f"{scale * test['mean']:.{digits}f} ± {scale * test['std']:.{digits}f}"
    best = min(row["test"]["mean"] for other, row in tasks[task].items() if other not in ABLATIONS)
    text = f"**{text}**" if test["mean"] == best else text
    return f"{text} ({test['diverged']} diverged)" if test["diverged"] else text


def speed(tasks: Mapping[str, Any], task: str, name: str) -> str:
    """Returns the steps, and the seconds where they were measured, to the loss that AdamW ends at."""
    steps, seconds = (tasks[task][name][f"{unit}_to_reference_loss"] for unit in ("steps", "seconds"))
    if steps is None:
        return "–"
    return str(steps) if seconds is None else f"{steps}, {seconds:.2f} s"


def trials(records: Records, tasks: Mapping[str, Any], task: str, name: str) -> str:
    """Returns the best, the first quartile and the median of the trials, and how many were not finite."""
    scale, row = _scale(records[task][name]), tasks[task][name]["trials"]
    of_key = lambda key: "∞" if np.isinf(row[key]) else f"{scale * row[key]:.3g}"
    return f"{' / '.join(map(of_key, ('best', 'quartile', 'median')))} ({row['non_finite']})"


def regret(defaults: Mapping[str, Any], task: str, name: str) -> str:
    """Returns by how much the defaults exceed the tuned setting."""
    if name not in defaults:
        return ""
    row = defaults[name]["tasks"][task]
    return "diverged" if not np.isfinite(row["regret"]) or row["diverged"] else f"{100 * row['regret']:+.0f} %"


def one_setting(settings: Mapping[str, Any], task: str, name: str) -> str:
    """Returns by how much the setting that is best for all tasks exceeds the best for this."""
    value = settings.get(name, {"tasks": {}})["tasks"].get(task, np.inf)
    return "diverged" if np.isinf(value) else f"{100 * value:+.0f} %"


def _sizes(records: Records) -> str:
    keys = ("parameters", "batch_size", "steps")
    rows = [[label_of(task), *(str(next(iter(of.values()))[key]) for key in keys)] for task, of in records.items()]
    return markdown(["task", "parameters", "B", "steps"], rows)


def _aims(goals: Sequence[Mapping[str, Any]]) -> str:
    number = lambda value: "–" if np.isinf(value) else f"{value:.4g}"
    rows = [
        [row["what"], label_of(row["task"]), number(row["value"]), number(row["bound"]), "yes" if row["met"] else "no"]
        for row in goals
    ]
    return markdown(["aim", "task", "measured", "bound", "met"], rows)


def _bullets(of_method: Mapping[str, Mapping[str, float]], show: Callable[[float], str]) -> str:
    """Returns a list of methods with named values."""
    values = lambda row: ", ".join(f"{key} {show(value)}" for key, value in row.items())
    return "\n".join(f"- {METHODS[name].label}: {values(row)}" for name, row in of_method.items()) + "\n"


def report(records: Records, summary: Mapping[str, Any]) -> str:
    """Returns all tables, each under its heading."""
    tasks, defaults, settings = summary["tasks"], summary["defaults"], summary["one_setting"]
    rates = ", ".join(f"{METHODS[name].label} {row['learning_rate']:.2g}" for name, row in defaults.items())
    by_share = {name: dict(sorted(row.items(), key=lambda item: -item[1])) for name, row in summary["knobs"].items()}
    cell = functools.partial
    return "\n".join(
        [
            "### Sizes\n",
            _sizes(records),
            "### Test error, % (characters: loss): mean ± standard deviation over seeds\n",
            by_task(records, cell(tested, records, tasks), ablations=True),
            "### Steps to AdamW's final loss, and seconds where all optimizers were timed by turns\n",
            by_task(records, cell(speed, tasks)),
            "### Trials: best / first quartile / median on validation data (not finite)\n",
            by_task(records, cell(trials, records, tasks), ablations=True),
            "### Regret of the defaults\n",
            f"At one learning rate for all tasks: {rates}.\n",
            by_task(records, cell(regret, defaults)),
            "### Excess of the one trial that is best for all tasks\n",
            by_task(records, cell(one_setting, settings)),
            _bullets({name: row["settings"] for name, row in settings.items()}, "{:.2g}".format),
            "### Which hyperparameter decides: share of the trials' variance in rank, mean over tasks\n",
            _bullets(by_share, lambda share: f"{100 * share:.0f} %"),
            "### Aims\n",
            _aims(summary["goals"]),
        ]
    )

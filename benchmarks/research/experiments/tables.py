"""The report's tables, in Markdown, of what summary.json holds."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Summary = Mapping[str, Any]


def labels(summary: Summary, *, ablations: bool = False) -> dict[str, str]:
    """Returns the methods' names and how they are shown, in the summary's order."""
    rows = [(name, row) for task in summary["tasks"].values() for name, row in task["methods"].items()]
    return {name: row["label"] for name, row in rows if ablations or not row["is_ablation"]}


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a table whose first column is text."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def by_task(summary: Summary, cell: Callable[[str, str], str], *, ablations: bool = False) -> str:
    """Returns a table of one row per method and one column per task."""
    tasks = summary["tasks"]
    rows = [
        [label, *(cell(task, name) if name in tasks[task]["methods"] else "" for task in tasks)]
        for name, label in labels(summary, ablations=ablations).items()
    ]
    return markdown(["", *(task["label"] for task in tasks.values())], rows)


def scale_of(task: Mapping[str, Any]) -> int:
    """Returns what a task's reported number is shown times: errors are in per cent."""
    return 100 if task["reported"] == "error" else 1


def tested(summary: Summary, task: str, name: str) -> str:
    """Returns mean and deviation of the test errors, the best in bold, and how many seeds diverged."""
    methods, scale = summary["tasks"][task]["methods"], scale_of(summary["tasks"][task])
    test, digits = methods[name]["test"], 2 if scale == 100 else 3
    text = f"{scale * test['mean']:.{digits}f} ± {scale * test['std']:.{digits}f}"
    best = min(row["test"]["mean"] for row in methods.values() if not row["is_ablation"])
    text = f"**{text}**" if test["mean"] == best else text
    return f"{text} ({test['diverged']} diverged)" if test["diverged"] else text


def speed(summary: Summary, task: str, name: str) -> str:
    """Returns the steps, and the seconds where they were measured, to the loss that AdamW ends at."""
    row = summary["tasks"][task]["methods"][name]
    steps, seconds = row["steps_to_reference_loss"], row["seconds_to_reference_loss"]
    if steps is None:
        return "–"
    return str(steps) if seconds is None else f"{steps}, {seconds:.2f} s"


def trials(summary: Summary, task: str, name: str) -> str:
    """Returns the best, the first quartile and the median of the trials, and how many were not finite."""
    scale, row = scale_of(summary["tasks"][task]), summary["tasks"][task]["methods"][name]["trials"]
    of_key = lambda key: "∞" if np.isinf(row[key]) else f"{scale * row[key]:.3g}"
    return f"{' / '.join(map(of_key, ('best', 'quartile', 'median')))} ({row['non_finite']})"


def regret(summary: Summary, task: str, name: str) -> str:
    """Returns by how much the defaults exceed the tuned setting."""
    row = summary["defaults"][name]["tasks"][task]
    return "diverged" if not np.isfinite(row["regret"]) or row["diverged"] else f"{100 * row['regret']:+.0f} %"


def one_setting(summary: Summary, task: str, name: str) -> str:
    """Returns by how much the setting that is best for all tasks exceeds the best for this."""
    value = summary["one_setting"][name]["tasks"][task]
    return "diverged" if np.isinf(value) else f"{100 * value:+.0f} %"


def _sizes(summary: Summary) -> str:
    keys = ("label", "parameters", "batch_size", "steps")
    rows = [[str(task[key]) for key in keys] for task in summary["tasks"].values()]
    return markdown(["task", "parameters", "B", "steps"], rows)


def _bullets(names: Mapping[str, str], of_method: Mapping[str, Mapping[str, float]], show: Callable) -> str:
    """Returns a list of methods with named values."""
    values = lambda row: ", ".join(f"{key} {show(value)}" for key, value in row.items())
    return "\n".join(f"- {names[name]}: {values(row)}" for name, row in of_method.items()) + "\n"


def report(summary: Summary) -> str:
    """Returns all tables, each under its heading."""
    names, settings = labels(summary), summary["one_setting"]
    rates = ", ".join(f"{names[name]} {row['learning_rate']:.2g}" for name, row in summary["defaults"].items())
    by_share = {name: dict(sorted(row.items(), key=lambda item: -item[1])) for name, row in summary["knobs"].items()}
    cell = lambda function: functools.partial(function, summary)
    return "\n".join(
        [
            "### Sizes\n",
            _sizes(summary),
            "### Test error, % (characters: loss): mean ± standard deviation over seeds\n",
            by_task(summary, cell(tested), ablations=True),
            "### Steps to AdamW's final loss, and seconds where all optimizers were timed by turns\n",
            by_task(summary, cell(speed)),
            "### Trials: best / first quartile / median on validation data (not finite)\n",
            by_task(summary, cell(trials), ablations=True),
            "### Regret of the defaults\n",
            f"At one learning rate for all tasks: {rates}.\n",
            by_task(summary, cell(regret)),
            "### Excess of the one trial that is best for all tasks\n",
            by_task(summary, cell(one_setting)),
            _bullets(names, {name: row["settings"] for name, row in settings.items()}, "{:.2g}".format),
            "### Which hyperparameter decides: share of the trials' variance in rank, mean over tasks\n",
            _bullets(names, by_share, lambda share: f"{100 * share:.0f} %"),
        ]
    )

"""From the records of the pairs to the numbers of the report: summary.json."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.methods import METHODS
from experiments.tasks import TASKS

Record = Mapping[str, Any]
Records = Mapping[str, Mapping[str, Record]]  # by task and optimizer
REFERENCE = "adamw"
TASK_KEYS = ("reported", "parameters", "batch_size", "steps")
LEAST = 1e-3  # below this, errors count as equal
ABLATIONS = ("rf_rmsprop_without_terms", "rf_rmsprop_from_zero")


def load(directory: pathlib.Path) -> dict[str, dict[str, Record]]:
    """Returns the records in a folder, in the order of the tables of tasks and methods."""
    records: dict[str, dict[str, Record]] = {}
    timed = directory / "times.json"  # measured by turns, by time_experiments.py, where that was run
    times = json.loads(timed.read_text()) if timed.is_file() else {}
    for path in directory.glob("*/*.json"):
        record = json.loads(path.read_text())
        record["milliseconds_by_turns"] = times.get(path.parent.name, {}).get(path.stem)
        records.setdefault(path.parent.name, {})[path.stem] = record
    place = lambda table, name: list(table).index(name) if name in table else len(table)
    return {
        task: dict(sorted(records[task].items(), key=lambda item: place(METHODS, item[0])))
        for task in sorted(records, key=lambda name: place(TASKS, name))
    }


def label_of(task: str) -> str:
    """Returns a task's name as it is shown."""
    return TASKS[task].label if task in TASKS else task


def statistics(values: Any) -> dict[str, float | int]:
    """Returns mean, standard deviation and standard error of the finite values, and how many others there are."""
    values = np.array(values, float)
    finite = values[np.isfinite(values)]
    deviation = finite.std(ddof=1) if finite.size > 1 else 0.0
    return {
        "mean": float(finite.mean()) if finite.size else float("inf"),
        "std": float(deviation),
        "standard_error": float(deviation / np.sqrt(max(finite.size, 1))),
        "diverged": int(values.size - finite.size),
    }


def curve(record: Record) -> np.ndarray:
    """Returns the losses [seeds, points] that speed is judged by: on fresh characters validation's, else training's."""
    return np.array(record["tested"]["validation_loss" if record["reported"] == "loss" else "train_loss"], float)


def steps_to(record: Record, target: float) -> int | None:
    """Returns after which tenth of the steps the seeds' mean loss is at most the target; None if it never is."""
    curves = curve(record)
    reached = np.flatnonzero(curves.mean(axis=0) <= target)  # NaN compares false: all seeds have to be alive
    return int(reached[0] + 1) * record["steps"] // curves.shape[1] if reached.size else None


def validated(outcome: Mapping[str, Any], reported: str) -> float:
    """Returns the mean over seeds of what the task reports, at the end, on validation data; infinite if one died."""
    final = np.array(outcome[f"validation_{reported}"], float)[:, -1]
    return float(final.mean()) if np.isfinite(final).all() else float("inf")


def spread(record: Record) -> dict[str, float]:
    """Returns the best, the first quartile and the median of the trials; diverged ones are the worst."""
    values = np.array([trial[f"validation_{record['reported']}"] for trial in record["trials"]], float)
    values = np.where(np.isnan(values), np.inf, values)
    return dict(zip(("best", "quartile", "median"), np.quantile(values, (0, 0.25, 0.5), method="lower"), strict=True))


def recommended(records: Records, name: str) -> int:
    """Returns which of the learning rates is best for the untuned method: by mean log ratio to tuned, on validation."""
    ratios = [
        [
            np.log(
                max(validated(row, record["reported"]), LEAST)
                / max(validated(record["tested"], record["reported"]), LEAST)
            )
            for row in record["defaults"]
        ]
        for record in (records[task][name] for task in records if name in records[task])
    ]
    return int(np.mean(ratios, axis=0).argmin())


def regrets(records: Records, name: str) -> dict[str, Any]:
    """Returns by how much untuned settings at the recommended learning rate exceed tuned ones on test data."""
    index, by_task, rate = recommended(records, name), {}, 0.0
    for task, methods in records.items():
        if name in methods:
            record, key = methods[name], f"test_{methods[name]['reported']}"
            rate = record["defaults"][index]["learning_rate"]
            untuned, tuned = statistics(record["defaults"][index][key]), statistics(record["tested"][key])
            excess = untuned["mean"] / tuned["mean"] - 1
            by_task[task] = {"untuned": untuned["mean"], "regret": excess, "diverged": untuned["diverged"]}
    return {"learning_rate": rate, "tasks": by_task}


def trial_ratios(records: Records, name: str) -> dict[str, np.ndarray]:
    """Returns for each task every trial's validation result over that of the task's best trial; infinite if it died.

    Every task was searched with the same draws, so that a trial is one setting for all.
    """
    ratios = {}
    for task, record in ((task, methods[name]) for task, methods in records.items() if name in methods):
        values = [trial[f"validation_{record['reported']}"] for trial in record["trials"]]
        numbers = np.array([np.inf if value is None else max(value, LEAST) for value in values])
        ratios[task] = numbers / numbers.min()
    return ratios


def one_setting(records: Records, name: str) -> dict[str, Any]:
    """Returns the trial that is best for all tasks, and by how much it exceeds each task's own best trial.

    Both are on validation data, from one seed: as the best of many trials owes something to luck, the excess is rather
    too large.
    """
    ratios = trial_ratios(records, name)
    index = int(np.mean([np.log(ratio) for ratio in ratios.values()], axis=0).argmin())
    record = next(methods[name] for methods in records.values() if name in methods)
    settings = {key: record["trials"][index][key] for key in record["chosen"]}
    return {"settings": settings, "tasks": {task: float(ratio[index] - 1) for task, ratio in ratios.items()}}


def explained(record: Record, key: str, bins: int = 4) -> float:
    """Returns the share of the variance among the trials' ranks that lies between the quarters of a hyperparameter."""
    trials = record["trials"]
    values = [trial[f"validation_{record['reported']}"] for trial in trials]
    ranks = np.argsort(np.argsort([np.inf if value is None else value for value in values])).astype(float)
    quarters = np.array_split(ranks[np.argsort([trial[key] for trial in trials])], bins)
    between = sum(len(quarter) * (quarter.mean() - ranks.mean()) ** 2 for quarter in quarters)
    return float(between / (len(ranks) * ranks.var()))


def knobs(records: Records, name: str) -> dict[str, float]:
    """Returns, for each hyperparameter, `explained` averaged over the tasks; three 63rds would be chance."""
    rows = [methods[name] for methods in records.values() if name in methods]
    return {key: float(np.mean([explained(record, key) for record in rows])) for key in rows[0]["chosen"]}


def summarize(records: Records) -> dict[str, Any]:
    """Returns the numbers of the report."""
    tasks = {}
    for task, methods in records.items():
        target = curve(methods[REFERENCE])[:, -1].mean() if REFERENCE in methods else -np.inf
        first = next(iter(methods.values()))
        tasks[task] = {"label": label_of(task), **{key: first[key] for key in TASK_KEYS}}
        tasks[task]["methods"] = {name: summarize_pair(name, record, target) for name, record in methods.items()}
    names = [name for name in METHODS if name not in ABLATIONS and any(name in methods for methods in records.values())]
    return {
        "tasks": tasks,
        "defaults": {name: regrets(records, name) for name in names},
        "one_setting": {name: one_setting(records, name) for name in names},
        "knobs": {name: knobs(records, name) for name in names},
    }


def summarize_pair(name: str, record: Record, target: float) -> dict[str, Any]:
    """Returns the numbers of one method on one task, with the steps to a loss of `target`."""
    steps, milliseconds = steps_to(record, target), record["milliseconds_by_turns"]
    tested, reported = record["tested"], record["reported"]
    return {
        "label": METHODS[name].label,
        "is_ablation": name in ABLATIONS,
        "chosen": record["chosen"],
        "seeds": tested[f"test_{reported}"],
        "test": statistics(tested[f"test_{reported}"]),
        "validation_loss": statistics(np.array(tested["validation_loss"], float)[:, -1]),
        "validation_curve": np.array(tested[f"validation_{reported}"], float).mean(axis=0),
        "steps_to_reference_loss": steps,
        "seconds_to_reference_loss": steps and milliseconds and 1e-3 * steps * milliseconds,
        "trials": spread(record) | {"non_finite": record["non_finite"], "count": len(record["trials"])},
    }

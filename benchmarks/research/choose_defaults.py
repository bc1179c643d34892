"""Chooses defaults for this library's optimizers: what does best on all tasks with one learning rate.

    PYTHONPATH=examples python benchmarks/research/choose_defaults.py
    PYTHONPATH=examples python benchmarks/research/choose_defaults.py --optimizer rf_rmsprop --task digits_vgg graphs

The candidates are what the defaults are now and the settings of the searches that rank best over all tasks, rounded to
one digit; weight decay stays at its default. Each is trained at five learning rates from a few seeds. The mean over
tasks of log(reported number / that of the tuned setting), on validation data, decides. Writes defaults.json beside
experiments/README.md, needs the records of run_experiments.py, and changes nothing else: defaults are written where
the optimizers are.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import numpy as np
import progress
from experiments import summary
from experiments.methods import METHODS, Candidate
from experiments.summary import Records
from experiments.tasks import TASKS
from experiments.trials import FIRST_SEED, Runner
from rich.progress import Progress
from rich.table import Table
from run_experiments import OUTPUT, RECORDS
from searching import Settings, rounded, to_json

NAMES = ("rf_rmsprop", "rf_adamw", "rf_shampoo", "sirf_shampoo", "sirf_exact")


def candidates(method: Candidate, records: Records, name: str, count: int) -> list[dict[str, float]]:
    """Returns the present defaults and the `count` best settings over all tasks, rounded, without learning rates."""
    ratios = summary.trial_ratios(records, name)
    order = np.argsort(np.mean([np.log(ratio) for ratio in ratios.values()], axis=0))
    trials = next(methods[name] for methods in records.values() if name in methods)["trials"]
    chosen = [dict(method.defaults)]
    for trial in (trials[index] for index in order):
        setting = {
            key: to_one_digit(trial[key], of_one_minus=method.ranges[key].of_one_minus) for key in method.defaults
        }
        setting["weight_decay"] = method.defaults["weight_decay"]
        if setting not in chosen:
            chosen.append(setting)
    return chosen[: count + 1]


def to_one_digit(value: float, *, of_one_minus: bool) -> float:
    """Returns the value, or one minus it, to one digit."""
    return round(1 - float(f"{1 - value:.0e}"), 12) if of_one_minus else float(f"{value:.0e}")


def grid(method: Candidate, settings: list[dict[str, float]]) -> Settings:
    """Returns every setting at every one of the method's five learning rates, in this order."""
    rates = method.untuned()["learning_rate"]
    values = {key: np.repeat([setting[key] for setting in settings], len(rates)) for key in settings[0]}
    return {"learning_rate": np.tile(rates, len(settings)), **values}


def excesses(task: str, name: str, record: summary.Record, settings: Settings, seeds: int) -> np.ndarray:
    """Returns log(reported number / that of the tuned setting) of each setting; infinite if a seed diverged."""
    reported = record["reported"]
    run = Runner(TASKS[task], METHODS[name])
    outcome = run.of_seeds(settings, range(FIRST_SEED, FIRST_SEED + seeds))
    losses = outcome.validation_loss[..., -1]
    values = np.where(np.isfinite(losses), getattr(outcome, f"validation_{reported}")[..., -1], np.inf).mean(axis=1)
    jax.clear_caches()  # no other pair has this program
    tuned = max(summary.validated(record["tested"], reported), summary.LEAST)
    return np.log(np.maximum(values, summary.LEAST) / tuned)


def choose(records: Records, name: str, count: int, seeds: int, bar: Progress) -> list[dict[str, Any]]:
    """Returns the candidates, each at its best common learning rate, best first."""
    method, tasks = METHODS[name], [task for task in records if name in records[task]]
    settings = candidates(method, records, name, count)
    everything = grid(method, settings)
    rows, counted = {}, bar.add_task(method.label, total=len(tasks), status="")
    for task in tasks:
        rows[task] = excesses(task, name, records[task][name], everything, seeds)
        bar.advance(counted)
    score = np.mean(list(rows.values()), axis=0).reshape(len(settings), -1)
    best = [(row, int(score[row].argmin())) for row in np.argsort(score.min(axis=1))]
    position = lambda row, rate: row * score.shape[1] + rate
    found = [
        {
            "settings": settings[row],
            "learning_rate": float(everything["learning_rate"][rate]),
            "mean_log_ratio": score[row, rate],
            "excess": {task: np.expm1(values[position(row, rate)]) for task, values in rows.items()},
            "is_default": settings[row] == dict(method.defaults),
        }
        for row, rate in best
    ]
    return rounded(found)


def show(label: str, rows: list[dict[str, Any]]) -> None:
    """Prints the candidates."""
    table = Table(title=f"{label}: excess over the tuned setting, on validation data")
    for heading in ("", *rows[0]["settings"], "learning rate", "mean", "by task"):
        table.add_column(heading, overflow="fold")
    percent = lambda value: "∞" if value is None else f"{100 * value:+.0f} %"
    for row in rows:
        numbers = (f"{value:.3g}" for value in (*row["settings"].values(), row["learning_rate"]))
        mean = row["mean_log_ratio"]
        tasks = " ".join(map(percent, row["excess"].values()))
        table.add_row("now" if row["is_default"] else "", *numbers, percent(mean and np.expm1(mean)), tasks)
    progress.console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--candidates", type=int, default=5, help="besides the present defaults")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--records", type=pathlib.Path, metavar="FOLDER", default=RECORDS, help="(%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", default=OUTPUT, help="of defaults.json")
    options = parser.parse_args(arguments)
    loaded = summary.load(options.records)
    records = {task: loaded[task] for task in options.task if task in loaded}
    path = options.output / "defaults.json"
    for name in options.optimizer:
        with progress.progress_bar() as bar:
            rows = choose(records, name, options.candidates, options.seeds, bar)
        show(METHODS[name].label, rows)
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(to_json(known | {name: rows}))


if __name__ == "__main__":
    main()

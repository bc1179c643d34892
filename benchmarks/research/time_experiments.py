"""Measures the trials per minute of one compiled program of many runs and of loops; and the time of a step, by turns.

    PYTHONPATH=examples python benchmarks/research/time_experiments.py
    PYTHONPATH=examples python benchmarks/research/time_experiments.py --task graphs --optimizer adamw
    PYTHONPATH=examples python benchmarks/research/time_experiments.py --steps

Three ways to run the same trials: side by side under `jax.vmap`; one after the other by one program, which takes the
hyperparameters as arguments; and one after the other with the hyperparameters as constants, so that each compiles.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import numpy as np
import progress
from experiments.methods import ABSENT, METHODS, Candidate
from experiments.summary import ABLATIONS
from experiments.tasks import TASKS, Task
from experiments.training import train
from experiments.trials import AT_ONCE, Runner
from rich.table import Table
from run_experiments import RECORDS

WAYS = ("together", "loop", "compiling_loop")


def per_minute(task: Task, method: Candidate, trials: int, recompiled: int) -> dict[str, float]:
    """Returns trials per minute of each way; compiling is part of the first and of the last, as in a search."""
    settings, seeds = method.draw(trials), np.arange(trials)
    rates = {}
    for way, at_once in (("together", AT_ONCE), ("loop", 1)):
        run = Runner(task, method, at_once)
        begin = time.perf_counter()
        run(settings, seeds)
        rates[way] = 60 * trials / (time.perf_counter() - begin)
    begin = time.perf_counter()
    for trial in range(recompiled):
        constants = {name: float(values[trial]) for name, values in settings.items()} | dict(method.fixed)
        jax.block_until_ready(jax.jit(functools.partial(train, task, method, constants))(seeds[trial], task.load()))
    return rates | {"compiling_loop": 60 * recompiled / (time.perf_counter() - begin)}


def milliseconds_per_step(tasks: list[str], names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Returns one run's share of a step, the fastest of some rounds, all optimizers of a task by turns."""
    times: dict[str, dict[str, float]] = {}
    with progress.progress_bar() as bar:
        counted = bar.add_task("step time", total=len(tasks) * len(names) * (rounds + 1), status="")
        for task in tasks:
            runs = {name: Runner(TASKS[task], METHODS[name]) for name in names}
            for _ in range(rounds + 1):  # the first one compiles
                for name, run in runs.items():
                    run(METHODS[name].draw(AT_ONCE), np.arange(AT_ONCE))
                    bar.advance(counted)
            share = 1e3 / AT_ONCE / TASKS[task].steps
            times[task] = {name: share * min(run.seconds[1:]) for name, run in runs.items()}
    return times


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, metavar="TASK")
    parser.add_argument("--optimizer", nargs="+", choices=METHODS, metavar="NAME")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--recompiled", type=int, default=3, help="trials of the loop that compiles each")
    parser.add_argument("--steps", action="store_true", help="the time of a step instead, of all optimizers by turns")
    parser.add_argument("--rounds", type=int, default=3, help="of the time of a step")
    parser.add_argument("--records", type=pathlib.Path, metavar="FOLDER", default=RECORDS, help="(%(default)s)")
    options = parser.parse_args(arguments)
    options.records.mkdir(parents=True, exist_ok=True)
    if options.steps:
        names = options.optimizer or [name for name in METHODS if name not in (*ABSENT, *ABLATIONS)]
        file = options.records / "times.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        times = milliseconds_per_step(options.task or list(TASKS), names, options.rounds)
        file.write_text(json.dumps(known | times, indent=1) + "\n")
        return
    table = Table("task", "optimizer", title=f"trials per minute, {options.trials} trials", title_justify="left")
    for heading in (f"{AT_ONCE} together", "loop", "loop that compiles"):
        table.add_column(heading, justify="right")
    for task in options.task or ["graphs", "digits_vgg"]:
        for name in options.optimizer or ["rf_rmsprop", "sirf_shampoo"]:
            rates = per_minute(TASKS[task], METHODS[name], options.trials, options.recompiled)
            table.add_row(task, METHODS[name].label, *(f"{rates[way]:.0f}" for way in WAYS))
    progress.console.print(table)


if __name__ == "__main__":
    main()

"""Writes the report of the records that run_experiments.py has written: tables.md, summary.json and four figures.

python examples/report_experiments.py
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import reporting
from experiments import figures, summary, tables
from experiments.methods import METHODS
from experiments.summary import ABLATIONS
from rich.table import Table
from run_experiments import RESULTS


def print_tests(numbers: Mapping[str, Any]) -> None:
    """Prints what every tuned method reaches on test data: one row per method, one short column per task."""
    table = Table(
        title="test error, %; on characters (LSTM and transformer): loss", title_justify="left", padding=(0, 0, 0, 1)
    )
    table.add_column("optimizer", no_wrap=True)
    for task in numbers["tasks"]:
        table.add_column(task.split("_")[-1], justify="right")
    for name in (name for name in numbers["defaults"] if name not in ABLATIONS):
        cells = []
        for task, methods in numbers["tasks"].items():
            scale = 1 if task.startswith("characters") else 100
            cells.append(f"{scale * methods[name]['test']['mean']:.3g}" if name in methods else "")
        table.add_row(METHODS[name].label, *cells)
    reporting.console.print(table)


def finite(value: Any) -> Any:
    """Returns the value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, metavar="DIR", default=RESULTS)
    options = parser.parse_args(arguments)
    records = summary.load(options.results)
    if not records:
        parser.error(f"--results must hold records of run_experiments.py, got {options.results}")
    numbers = summary.summarize(records)
    (options.results / "summary.json").write_text(json.dumps(finite(numbers), indent=1) + "\n")
    (options.results / "tables.md").write_text(tables.report(records, numbers))
    figures.save(figures.draw_tests(records, numbers), options.results / "tests.png")
    figures.save(figures.draw_curves(records), options.results / "curves.png")
    figures.save(figures.draw_trials(records), options.results / "trials.png")
    figures.save(figures.draw_regrets(records, numbers), options.results / "regrets.png")
    print_tests(numbers)


if __name__ == "__main__":
    main()

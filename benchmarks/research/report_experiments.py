"""Writes the report of the records that run_experiments.py has written: summary.json, tables.md and a figure.

    PYTHONPATH=examples python benchmarks/research/report_experiments.py

They lie beside experiments/README.md. Validation curves and regrets of the defaults are drawn in the notebook.
"""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

import progress
from experiments import figures, summary, tables
from rich.table import Table
from run_experiments import OUTPUT, RECORDS
from searching import to_json


def print_tests(numbers: Mapping[str, Any]) -> None:
    """Prints what every tuned method reaches on test data: one row per method, one short column per task."""
    table = Table(
        title="test error, %; on characters (LSTM and transformer): loss", title_justify="left", padding=(0, 0, 0, 1)
    )
    table.add_column("optimizer", no_wrap=True)
    for task in numbers["tasks"]:
        table.add_column(task.split("_")[-1], justify="right")
    for name, label in tables.labels(numbers).items():
        cells = []
        for task in numbers["tasks"].values():
            scale = 1 if task["reported"] == "loss" else 100
            methods = task["methods"]
            cells.append(f"{scale * methods[name]['test']['mean']:.3g}" if name in methods else "")
        table.add_row(label, *cells)
    progress.console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, metavar="FOLDER", default=RECORDS, help="(%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", default=OUTPUT)
    options = parser.parse_args(arguments)
    records = summary.load(options.records)
    if not records:
        parser.error(f"--records must hold records of run_experiments.py, got {options.records}")
    numbers = summary.summarize(records)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "summary.json").write_text(to_json(numbers))
    (options.output / "tables.md").write_text(tables.report(numbers))
    figures.save(figures.draw_tests(numbers), options.output / "tests.png")
    print_tests(numbers)


if __name__ == "__main__":
    main()

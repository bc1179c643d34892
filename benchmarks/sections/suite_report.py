"""All recorded runs of the suite as one Markdown page."""

import json
import pathlib
from typing import Any

from harness import machine, report

from sections import cost, suite

HEAD = """# What a step costs

Written by `python benchmarks/suite.py --trees report` from the records beside it. The optimizers are as users build
them, at their defaults unless the name says otherwise. Milliseconds are of one machine: compare within a table.
"""


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the page `costs.md` from a folder's records, and returns its path."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("suite_*.json"))]
    sections = [section for run in runs for section in _sections_of_tree(folder, run)]
    if (compiled := folder / "cost.json").exists():
        run = json.loads(compiled.read_text())
        sections.append(_section(cost.TITLE, cost.CAPTION, cost.COLUMNS, run["records"], run["machine"]))
    path = folder / "costs.md"
    path.write_text("\n".join([HEAD, *sections]))
    return path


def _sections_of_tree(folder: pathlib.Path, run: dict[str, Any]) -> list[str]:
    settings, records = run["settings"], run["records"]
    figure = f"suite_{settings['tree']}.png"
    ran = [record for record in records if "problem" not in record]
    tables = [
        (suite.TITLE, suite.CAPTION, suite.time_columns()),
        (suite.PROGRAM_TITLE, suite.PROGRAM_CAPTION, suite.PROGRAM_COLUMNS),
    ]
    texts = [(title.format(**settings), caption.format(**settings), columns) for title, caption, columns in tables]
    sections = [_section(title, caption, columns, ran, run["machine"]) for title, caption, columns in texts]
    drawn = [f"![{texts[0][0]}]({figure})\n"] if (folder / figure).exists() else []
    return [sections[0], *drawn, *sections[1:]]


def _section(
    title: str, caption: str, columns: list[report.Column], records: list[dict[str, Any]], where: dict[str, Any]
) -> str:
    table = report.markdown_table(columns, records)
    return f"## {title}\n\n{table}\n\n{caption} {machine.summary(where)}.\n"

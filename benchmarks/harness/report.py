"""Prints records as a table and writes them as JSON."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: the record's key, the heading, and how a value becomes text.

    Attributes:
      key: which entry of a record.
      heading: may hold a line break.
      spec: a format specification, applied to value·factor; the empty string prints text as it is.
      factor: the unit's factor, 1e3 to show seconds as milliseconds.
    """

    key: str
    heading: str
    spec: str = ""
    factor: float = 1.0

    def show(self, record: dict[str, Any]) -> str:
        """Returns the text of this column for one record; a missing value is a dash."""
        value = record.get(self.key)
        if value is None:
            return "–"
        return format(value * self.factor, self.spec) if self.spec else str(value)


def table(title: str, caption: str, columns: Sequence[Column], records: Sequence[dict[str, Any]]) -> Table:
    """Returns a table with one row per record: text to the left, numbers to the right."""
    result = _empty(title, caption)
    for column in columns:
        result.add_column(column.heading, justify="right" if column.spec else "left", no_wrap=True)
    for record in records:
        result.add_row(*(column.show(record) for column in columns))
    return result


def turned_table(title: str, caption: str, columns: Sequence[Column], records: Sequence[dict[str, Any]]) -> Table:
    """Returns a table with one column per record, the first of `columns` at their heads, and one row for each other."""
    names, *rows = columns
    result = _empty(title, caption)
    result.add_column(names.heading, no_wrap=True)
    for record in records:
        result.add_column(names.show(record), justify="right", overflow="fold")
    for row in rows:
        heading = row.heading.replace("-\n", "").replace("\n", " ")
        result.add_row(heading, *(row.show(record) for record in records))
    return result


def markdown_table(columns: Sequence[Column], records: Sequence[dict[str, Any]]) -> str:
    """Returns a table of Markdown with one row per record, without columns that no record fills; no text is "none"."""
    columns = [column for column in columns if any(record.get(column.key) is not None for record in records)]
    headings = [column.heading.replace("-\n", "").replace("\n", " ") for column in columns]
    bars = ["---:" if column.spec else "---" for column in columns]
    rows = [[column.show(record) or "none" for column in columns] for record in records]
    return "\n".join([f"| {' | '.join(cells)} |" for cells in (headings, bars, *rows)])


def _empty(title: str, caption: str) -> Table:
    result = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    result.box, result.show_edge, result.pad_edge = box.SIMPLE_HEAD, False, False
    return result


def write_json(
    path: pathlib.Path, *, machine: dict[str, Any], settings: dict[str, Any], records: Sequence[dict[str, Any]]
) -> None:
    """Writes what was measured, how and where, one record a line; folders are made as needed."""
    lines = ",\n".join(f"  {_json(record)}" for record in records)
    text = f'{{\n "machine": {_json(machine)},\n "settings": {_json(settings)},\n "records": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _json(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False, allow_nan=False)


def _rounded(value: Any) -> Any:
    """Returns plain numbers of six digits; None for one that is not finite."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_rounded(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def show(console: Console, *args: Any, **kwargs: Any) -> None:
    """Prints the table of the same arguments after an empty line, `turned_table`'s where that of rows is too wide."""
    by_rows = table(*args, **kwargs)
    needed = Measurement.get(console, console.options.update(max_width=10_000), by_rows).maximum
    console.print()
    console.print(by_rows if needed <= console.width else turned_table(*args, **kwargs))

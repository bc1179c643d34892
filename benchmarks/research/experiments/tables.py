"""How the methods and the numbers of summary.json are shown."""

from collections.abc import Mapping
from typing import Any

Summary = Mapping[str, Any]


def labels(summary: Summary, *, ablations: bool = False) -> dict[str, str]:
    """Returns the methods' names and how they are shown, in the summary's order."""
    rows = [(name, row) for task in summary["tasks"].values() for name, row in task["methods"].items()]
    return {name: row["label"] for name, row in rows if ablations or not row["is_ablation"]}


def scale_of(task: Mapping[str, Any]) -> int:
    """Returns what a task's reported number is shown times: errors are in per cent."""
    return 100 if task["reported"] == "error" else 1

"""A figure of the suite's records: mean and slowest step of each method."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.figure

OURS = ("sirf_", "kl_", "rf_", "published.")


def draw(path: pathlib.Path, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Writes a bar for each method's mean step and a mark at its slowest, on a logarithmic axis, fastest on top."""
    timed = sorted((r for r in records if "mean_seconds" in r), key=lambda r: r["mean_seconds"], reverse=True)
    figure = matplotlib.figure.Figure(figsize=(8, 0.6 + 0.3 * len(timed)), layout="constrained")
    axes = figure.subplots()
    means, slowest = ([1e3 * record[key] for record in timed] for key in ("mean_seconds", "max_seconds"))
    ours = [record["method"].startswith(OURS) for record in timed]
    positions = range(len(timed))
    axes.barh(positions, means, color=["tab:blue" if own else "tab:gray" for own in ours], height=0.7)
    axes.scatter(slowest, positions, color="black", marker="|", s=80, zorder=3)
    for position, value in zip(positions, means, strict=True):
        label = f"{value:.0f}" if value >= 100 else f"{value:.2g}"
        axes.text(value / 1.05, position, label, va="center", ha="right", color="white", fontsize=8)
    axes.set_yticks(positions, [record["method"] for record in timed], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left=min(means) / 3)  # room for the shortest bar's number
    axes.set_xlabel("one step of the optimizer, ms: mean over a period (bar) and slowest (mark)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

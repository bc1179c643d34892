"""Tables and figures of the ladder."""

import collections
import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from harness import report

from ladder.train import PIECES, Result

FINAL = PIECES // 10
"""The final training loss is the mean of the last tenth."""

COLUMNS = (
    report.Column("name", "method"),
    report.Column("learning_rate", "rate", ".3g"),
    report.Column("train_loss", "train.", ".4f"),
    report.Column("train_loss_error", "±", ".4f"),
    report.Column("valid_loss", "valid.", ".4f"),
    report.Column("valid_loss_error", "±", ".4f"),
    report.Column("share_to_adamw", "to AdamW", ".2f"),
    report.Column("run_step_seconds", "ms", ".2f", 1e3),
)
CAPTION = (
    "Final losses, means over {seeds} seeds, and their standard errors. The training loss is of the run's last tenth. "
    "To AdamW: the part of the run until AdamW's final training loss at its best rate. Milliseconds are for a step of "
    "one run, of those that were trained side by side."
)


def summarize(results: Iterable[Result], decisive: str) -> list[dict[str, Any]]:
    """Returns one record for each method, learning rate and value of a traced option: means over seeds.

    A record has the losses of every seed, and the mean training losses of all pieces.

    Args:
      results: one for each method.
      decisive: "train_loss" or "valid_loss", which of them says what AdamW's best rate is.
    """
    records = []
    for result in results:
        names = [name for name in result.runs if name != "seed"]
        groups = collections.defaultdict(list)
        for index, point in enumerate(zip(*(result.runs[name].tolist() for name in names), strict=True)):
            groups[point].append(index)
        for point, indices in groups.items():
            values = {name: float(f"{value:.4g}") for name, value in zip(names, point, strict=True)}
            train, valid = result.train[indices], result.valid[indices]
            finals = {"train_loss": train[:, -FINAL:].mean(1), "valid_loss": valid[:, -1]}
            records.append(
                {
                    "name": _name(result.method.spelling, values),
                    "learning_rate": values["learning_rate"],
                    **{key: losses.mean() for key, losses in finals.items()},
                    **{f"{key}_error": _standard_error(losses) for key, losses in finals.items()},
                    "valid_error": result.error[indices, -1].mean(),
                    "run_step_seconds": result.seconds / result.steps / len(result.train),
                    "compile_seconds": result.compile_seconds,
                    "seconds": result.seconds,
                    "valid_losses": valid,
                    "final_train_losses": finals["train_loss"],
                    "train_losses": train.mean(0),
                }
            )
    _add_shares(records, decisive)
    return records


def _standard_error(losses: np.ndarray) -> float | None:
    return losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else None


def _name(spelling: str, values: dict[str, float]) -> str:
    """Returns the spelling of a method with one value for each option."""
    traced = lambda match: f"{match[1]}={values[match[1]]:g}" if match[1] in values else match[0]
    return re.sub(r"(\w+)=([^,]+)", traced, spelling)


def best(records: Sequence[dict[str, Any]], decisive: str) -> list[dict[str, Any]]:
    """Returns each method's record of the lowest decisive loss, in the order of the methods."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        name = record["name"]
        if name not in found or record[decisive] < found[name][decisive]:
            found[name] = record
    return list(found.values())


def _add_shares(records: Sequence[dict[str, Any]], decisive: str) -> None:
    """Adds which part of the run it takes to AdamW's final training loss; None where that is not reached."""
    of_adamw = [record for record in best(records, decisive) if record["name"] == "adamw"]
    for record in records if of_adamw else ():
        record["share_to_adamw"] = _share_to(of_adamw[0]["train_loss"], record["train_losses"])


def _share_to(loss: float, losses: np.ndarray) -> float | None:
    """Returns the part of the run after which a curve stays at or below a loss, between the middles of the pieces."""
    above = np.flatnonzero(losses > loss)
    last = above[-1] if len(above) else -1
    if last == len(losses) - 1:
        return None
    if last < 0:
        return 0.5 / len(losses)
    part = (losses[last] - loss) / (losses[last] - losses[last + 1])
    return float((last + 0.5 + part) / len(losses))


def draw(path: pathlib.Path, title: str, settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Writes two plots: loss against steps at each method's best rate, and final loss against learning rate."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    decisive = settings["decisive_loss"]
    steps = (np.arange(PIECES) + 0.5) / PIECES * settings["steps"]
    for index, of_best in enumerate(best(records, decisive)):
        color = f"C{index % 10}"
        left.plot(
            steps, of_best["train_losses"], color=color, lw=1.2, label="{name}, {learning_rate:g}".format(**of_best)
        )
        same = [record for record in records if record["name"] == of_best["name"]]
        same.sort(key=lambda record: record["learning_rate"])
        rates, losses = ([record[key] for record in same] for key in ("learning_rate", decisive))
        right.errorbar(
            rates, losses, [r[f"{decisive}_error"] or 0 for r in same], color=color, marker="o", ms=4, lw=1.2
        )
    lowest = min(r["train_losses"][-1] for r in records)
    left.set(xlabel="steps", ylabel="training loss", ylim=(0.97 * lowest, 2 * lowest))
    left.legend(fontsize=7, title="at its best rate", title_fontsize=7)
    right.set(
        xlabel="learning rate",
        ylabel={"train_loss": "final training loss", "valid_loss": "final validation loss"}[decisive],
        xscale="log",
    )
    finals = [r[decisive] for r in records if math.isfinite(r[decisive])]
    right.set_ylim(min(finals) - 0.02, min(max(finals), 1.5 * min(finals)) + 0.02)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

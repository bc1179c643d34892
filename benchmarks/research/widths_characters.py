"""Asks whether one setting of SIRF-Shampoo serves every width of the character transformer.

    PYTHONPATH=examples python benchmarks/research/widths_characters.py
    PYTHONPATH=examples python benchmarks/research/widths_characters.py --refresh exact --widths 32 64 128
    PYTHONPATH=examples python benchmarks/research/widths_characters.py --report

A search at one width chooses the setting: one β₂, one damping, and a learning rate in inverse proportion to the width
(gradients shrink as the width grows, and directions are as their inverses). Every width is then trained with that
setting, and searched in its neighbourhood; how far the one setting's loss lies above each width's own best is what
counts. The factors are refreshed at every tenth step, by the published refresh or by the exact one, with the same
budget. Writes widths_REFRESH.json to results/characters, prints a table of all that have been written, and draws
widths.png.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import progress
from characters import corpus
from characters.corpus import Corpus
from characters.methods import METHODS, RECORDS
from characters.training import SEGMENT, SEQUENCE, Network, Run
from characters.trials import FIRST_SEED, Budget, choose, measure
from rich.progress import Progress
from rich.table import Table
from searching import Range, Settings, rows, to_json

import rootfree_optax as rf

LAYOUT = rf.Layout(block_size=512)  # the MLP's axes are four times as long as the width
REFRESHES = {"published": "sirf_published_t10", "exact": "sirf_exact_plain"}
NEIGHBOURHOOD = {"learning_rate": Range(1 / 4, 4), "preconditioner_lr": Range(1 / 4, 4), "damping": Range(1 / 30, 30)}
LARGEST_PRECONDITIONER_LR = 0.9
COLORS = {"published": "#56B4E9", "exact": "#D55E00"}


def neighbours(setting: Mapping[str, float], trials: int) -> dict[str, np.ndarray]:
    """Returns trials around a setting, which is the first of them."""
    rng = np.random.default_rng(1)
    settings = {name: np.full(trials, value) for name, value in setting.items()}
    for name, factors in NEIGHBOURHOOD.items():
        settings[name][1:] *= factors.draw(rng, trials - 1)
    settings["preconditioner_lr"] = np.minimum(settings["preconditioner_lr"], LARGEST_PRECONDITIONER_LR)
    return settings


def at_width(
    run: Run, data: Corpus, steps: int, settings: Settings, fresh_seeds: int, bar: Progress, description: str
) -> dict[str, Any]:
    """Returns the losses of the first setting and of the best one, of seeds that did not choose it."""
    losses, seconds = measure(run, data, steps, settings, [FIRST_SEED], bar, description)
    pair = [0, int(losses.mean(axis=1).argsort()[0])]
    compared = {name: values[pair] for name, values in settings.items()}
    fresh, _ = measure(run, data, steps, compared, range(fresh_seeds), bar, "fresh seeds")
    fixed, tuned = fresh.mean(axis=1)
    return {
        "width": run.network.width,
        "fixed": number(fixed),
        "tuned": number(tuned),
        "excess": number(fixed / tuned - 1),
        "diverged": int(np.sum(~np.isfinite(losses))),
        "median_seconds_of_trials": float(np.median(seconds)),
        "best": {name: float(values[1]) for name, values in compared.items()},
        "trials": rows(settings, {"validation_loss": losses}),
    }


def number(value: float) -> float | None:
    """Returns a number, or None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def study(refresh: str, data: Corpus, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the record of one refresh after every width."""
    of_refresh = METHODS[REFRESHES[refresh]]
    method = dataclasses.replace(of_refresh, build=functools.partial(of_refresh.build, layout=LAYOUT))
    run = lambda width: Run(method, Network(width, options.layers), options.batch_size)
    kept = ("steps", "batch_size", "layers", "base_width", "base_trials", "trials", "seeds", "learning_rate_exponent")
    record = {"refresh": refresh, "python": platform.python_version()}
    record |= {key: getattr(options, key) for key in kept}
    record["neighbourhood"] = {name: f"{limits} times" for name, limits in NEIGHBOURHOOD.items()}
    with progress.progress_bar() as bar:
        budget = Budget(options.steps, options.base_trials, 4, 1)
        base = choose(run(options.base_width), data, budget, bar)
        found = []
        for width in options.widths:
            scale = (width / options.base_width) ** options.learning_rate_exponent
            setting = base["chosen"] | {"learning_rate": base["chosen"]["learning_rate"] * scale}
            settings = neighbours(setting, options.trials)
            found.append(at_width(run(width), data, options.steps, settings, options.seeds, bar, f"width {width}"))
            yield record | {"chosen": base["chosen"], "base": base["trials"], "widths": found}


def print_table(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints one row per width, with both refreshes side by side."""
    table = Table(
        title="one setting at every width",
        caption="validation loss of the one setting and of each width's own best; how far the one is above the other",
        title_justify="left",
        caption_justify="left",
        padding=(0, 0, 0, 1),
    )
    table.add_column("width", justify="right")
    for refresh in records:
        for heading in ("one setting", "own best", "excess, %"):
            table.add_column(f"{refresh}\n" + heading.replace(" ", "\n"), justify="right", no_wrap=True)
    widths = {row["width"] for record in records.values() for row in record["widths"]}
    for width in sorted(widths):
        cells = []
        for record in records.values():
            row = next((row for row in record["widths"] if row["width"] == width), None)
            losses = [None, None, None] if row is None else [row["fixed"], row["tuned"], row["excess"]]
            cells += ["–" if loss is None else f"{loss:.3f}" for loss in losses[:2]]
            cells.append("–" if losses[2] is None else f"{100 * losses[2]:.1f}")
        table.add_row(str(width), *cells)
    progress.console.print(table)


def draw(path: pathlib.Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a PNG: losses of the one setting and of each width's best; and the one setting's excess."""
    figure, (loss_axes, excess_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for refresh, record in records.items():
        column = lambda name, record=record: np.array([row[name] for row in record["widths"]], float)
        color = COLORS[refresh]
        loss_axes.plot(column("width"), column("fixed"), "o-", color=color, label=f"{refresh}, one setting")
        loss_axes.plot(column("width"), column("tuned"), "o:", color=color, label=f"{refresh}, own best")
        excess_axes.plot(column("width"), 100 * column("excess"), "o-", color=color, label=refresh)
    excess_axes.axhline(3, color="#595959", linewidth=0.8, linestyle=(0, (1, 3)))
    loss_axes.set(title="Validation loss")
    excess_axes.set(title="One setting above the width's own best, %")
    ticks = sorted({row["width"] for record in records.values() for row in record["widths"]})
    for axes in (loss_axes, excess_axes):
        axes.set(xscale="log", xlabel="width")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh", nargs="+", choices=REFRESHES, default=list(REFRESHES))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--trials", type=int, default=8, help="at every width, the one setting included")
    parser.add_argument("--seeds", type=int, default=2, help="fresh ones, of the one setting and of the best")
    parser.add_argument("--base-width", type=int, default=64, help="the width whose search chooses the one setting")
    parser.add_argument("--base-trials", type=int, default=32)
    parser.add_argument("--learning-rate-exponent", type=float, default=-1.0, help="e: it is scaled by (width/base)^e")
    parser.add_argument("--steps", type=int, default=200, help=f"a multiple of {SEGMENT}")
    parser.add_argument("--batch-size", type=int, default=8, help=f"sequences of {SEQUENCE} characters")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR", default=RECORDS)
    parser.add_argument("--report", action="store_true", help="print and draw what has been written, train nothing")
    options = parser.parse_args(arguments)
    if options.steps % SEGMENT:
        parser.error(f"--steps must be a multiple of {SEGMENT}, got {options.steps}")

    options.output.mkdir(parents=True, exist_ok=True)
    file = lambda refresh: options.output / f"widths_{refresh}.json"
    if not options.report:
        data = corpus.load(SEQUENCE)
        for refresh in options.refresh:
            for record in study(refresh, data, options):
                file(refresh).write_text(to_json(record))
    records = {refresh: json.loads(file(refresh).read_text()) for refresh in REFRESHES if file(refresh).is_file()}
    print_table(records)
    draw(options.output / "widths.png", records)


if __name__ == "__main__":
    main()

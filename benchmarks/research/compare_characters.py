"""Compares the optimizers of the character transformer at their tuned settings.

    PYTHONPATH=examples python benchmarks/research/compare_characters.py
    PYTHONPATH=examples python benchmarks/research/compare_characters.py --optimizer adamw muon --rounds 5
    PYTHONPATH=examples python benchmarks/research/compare_characters.py --measure time

Reads the records of tune_characters.py, measures the time of a step by turns, trains each chosen setting for half as
many steps, too, and prints a table; writes summary.json (the table's numbers) and comparison.png (the curves) beside
characters/README.md. What `--measure` leaves out is taken from summary.json.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import progress
from characters import corpus
from characters.corpus import Corpus
from characters.methods import METHODS, RECORDS
from characters.training import SEGMENT, SEQUENCE, Network, Run, initial_params, start, train_segment
from characters.trials import of_one_type, train
from rich.table import Table
from searching import to_json

OUTPUT = pathlib.Path(__file__).parent / "characters"
REFERENCE = "adamw"
MEASURED = ("time", "half")
STYLES = {  # one colour a family, one dash a variant
    "adamw": ("#595959", "-"),
    "rf_rmsprop": ("#E69F00", "-"),
    "muon": ("#009E73", "-"),
    "sirf_published": ("#56B4E9", "-"),
    "sirf_published_t10": ("#56B4E9", "--"),
    "sirf_exact_plain": ("#CC79A7", "-."),
    "sirf_exact_t1": ("#D55E00", "--"),
    "sirf_exact": ("#D55E00", "-"),
    "sirf_exact_bfloat16": ("#D55E00", ":"),
}


def run_of(record: Mapping[str, Any]) -> Run:
    """Returns the run that a record is of."""
    return Run(METHODS[record["optimizer"]], Network(record["width"], record["layers"]), record["batch_size"])


def validation_curves(record: Mapping[str, Any]) -> np.ndarray:
    """Returns validation losses, [seeds, segments], NaN where a run had diverged."""
    return np.array(record["validation_curves"], float)


def milliseconds_per_step(records: Mapping[str, Mapping[str, Any]], data: Corpus, rounds: int) -> dict[str, float]:
    """Returns the median time of a step of each optimizer, all of them measured by turns."""
    key = jax.random.key(0)
    states, durations = {}, {name: [] for name in records}
    with progress.progress_bar() as bar:
        task = bar.add_task("step time", total=(rounds + 1) * len(records), status="")
        for turn in range(rounds + 1):  # the first one compiles
            for name, record in records.items():
                run, chosen = run_of(record), of_one_type(record["chosen"])
                state = states.pop(name) if turn else start(run, chosen, initial_params(run.network, key))
                begin = time.perf_counter()
                state, _ = train_segment(run, chosen, record["steps"], turn * SEGMENT, key, data.train, state)
                states[name] = jax.block_until_ready(state)
                if turn:
                    durations[name].append(time.perf_counter() - begin)
                bar.advance(task)
    return {name: 1e3 * float(np.median(seconds)) / SEGMENT for name, seconds in durations.items()}


def shorter_runs(records: Mapping[str, Mapping[str, Any]], data: Corpus, seeds: int) -> dict[str, dict[str, Any]]:
    """Returns the statistics of the losses after half as many steps, the schedule shortened as well."""
    losses: dict[str, list[float]] = {name: [] for name in records}
    with progress.progress_bar() as bar:
        task = bar.add_task("half the steps", total=seeds * len(records), status="")
        for name, record in records.items():
            steps = record["steps"] // 2 // SEGMENT * SEGMENT
            for seed in range(seeds):
                curves = train(run_of(record), data, steps, record["chosen"], seed)
                losses[name].append(float(curves.validation_loss[-1]))
                bar.update(task, advance=1, status=f"{METHODS[name].label} {losses[name][-1]:.3f}")
    return {name: statistics(np.array(values)) for name, values in losses.items()}


def summarize(
    records: Mapping[str, Mapping[str, Any]], milliseconds: Mapping[str, float], shorter: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns the numbers of the table, by optimizer; losses of runs that diverged are counted, not averaged."""
    target = statistics(validation_curves(records[REFERENCE])[:, -1])["mean"]
    summary = {}
    for name, record in records.items():
        curves = validation_curves(record)
        reached = np.flatnonzero(curves.mean(axis=0) <= target)  # NaN compares false: all seeds have to be alive
        steps = int(reached[0] + 1) * SEGMENT if reached.size else None
        summary[name] = {
            "chosen": record["chosen"],
            "validation_loss": statistics(curves[:, -1]),
            "validation_loss_of_half_the_steps": shorter[name],
            "steps_to_reference_loss": steps,
            "milliseconds_per_step": milliseconds[name],
            "seconds_to_reference_loss": None if steps is None else 1e-3 * steps * milliseconds[name],
        }
    return summary


def statistics(losses: np.ndarray) -> dict[str, float | int]:
    """Returns the mean of the finite losses, its standard error, and how many diverged."""
    alive = losses[np.isfinite(losses)]
    error = alive.std(ddof=1) / np.sqrt(alive.size) if alive.size > 1 else 0.0
    mean = alive.mean() if alive.size else 0.0
    return {"mean": float(mean), "standard_error": float(error), "diverged": int(losses.size - alive.size)}


def text_of(loss: Mapping[str, Any]) -> str:
    """Returns a mean and its standard error as the table shows them."""
    text = f"{loss['mean']:.3f} ± {loss['standard_error']:.3f}"
    return f"{text}\n({loss['diverged']} diverged)" if loss["diverged"] else text


def print_table(title: str, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints one row per optimizer."""
    reference = METHODS[REFERENCE].label
    caption = f"validation loss: mean ± standard error over seeds; steps and time to {reference}'s final one"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", padding=(0, 0, 0, 1))
    table.add_column("optimizer", no_wrap=True)
    for heading in (
        "validation\nloss",
        "half the\nsteps",
        f"steps to\n{reference}'s",
        "ms per\nstep",
        "time to\nit, s",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in summary.items():
        steps, seconds = row["steps_to_reference_loss"], row["seconds_to_reference_loss"]
        table.add_row(
            METHODS[name].label,
            text_of(row["validation_loss"]),
            text_of(row["validation_loss_of_half_the_steps"]),
            "–" if steps is None else str(steps),
            f"{row['milliseconds_per_step']:.1f}",
            "–" if seconds is None else f"{seconds:.1f}",
        )
    progress.console.print(table)


def draw(path: pathlib.Path, title: str, records: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Writes a PNG of validation losses over steps and over time: the mean over seeds, and their range as a band."""
    figure, (step_axes, time_axes) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    target = summary[REFERENCE]["validation_loss"]["mean"]
    lowest = min(row["validation_loss"]["mean"] for row in summary.values())
    for name, record in records.items():
        color, dash = STYLES[name]
        curves = validation_curves(record)
        steps = SEGMENT * np.arange(1, curves.shape[1] + 1)
        seconds = 1e-3 * steps * summary[name]["milliseconds_per_step"]
        for axes, x in ((step_axes, steps), (time_axes, seconds)):
            axes.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.12, linewidth=0)
            axes.plot(x, curves.mean(axis=0), dash, color=color, label=METHODS[name].label)
    for axes, label in ((step_axes, "step"), (time_axes, "seconds of steps")):
        axes.axhline(target, color=STYLES[REFERENCE][0], linewidth=0.8, linestyle=(0, (1, 3)))
        axes.set(xlabel=label, ylim=(lowest - 0.05, target + 1), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    step_axes.set(ylabel="validation loss")
    time_axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(METHODS)
    parser.add_argument("--optimizer", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    parser.add_argument("--measure", nargs="*", choices=MEASURED, default=MEASURED, help="half: half the steps")
    parser.add_argument("--rounds", type=int, default=15, help=f"of {SEGMENT} steps of each, for the step time")
    parser.add_argument("--shorter-seeds", type=int, default=5, help="of the runs of half the steps")
    parser.add_argument("--records", type=pathlib.Path, metavar="FOLDER", default=RECORDS, help="(%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", default=OUTPUT, help="of summary and figure")
    options = parser.parse_args(arguments)
    if REFERENCE not in options.optimizer:
        parser.error(f"--optimizer must name the reference, {REFERENCE}, got {' '.join(options.optimizer)}")

    data = corpus.load(SEQUENCE)
    records = {name: json.loads((options.records / f"{name}.json").read_text()) for name in options.optimizer}
    file = options.output / "summary.json"
    known = json.loads(file.read_text()) if len(options.measure) < len(MEASURED) else {}
    of_known = lambda key: {name: known[name][key] for name in records}
    milliseconds = (
        milliseconds_per_step(records, data, options.rounds)
        if "time" in options.measure
        else of_known("milliseconds_per_step")
    )
    shorter = (
        shorter_runs(records, data, options.shorter_seeds)
        if "half" in options.measure
        else of_known("validation_loss_of_half_the_steps")
    )
    summary = summarize(records, milliseconds, shorter)
    reference = records[REFERENCE]
    title = f"characters: width {reference['width']}, {reference['steps']} steps, {reference['fresh_seeds']} seeds"
    print_table(title, summary)
    file.write_text(to_json(summary))
    draw(options.output / "comparison.png", f"{title} (mean and range)", records, summary)


if __name__ == "__main__":
    main()

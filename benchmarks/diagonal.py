"""Step time and state size of the diagonal optimizers, beside Optax's own, on a transformer's parameters.

A step is `jit` of update and apply_updates with parameters and state donated. The methods take turns within one run,
and every ratio of times is to AdamW's median (or fastest call) of that run. Traffic is how many bytes the compiled step
reads and writes: what limits an elementwise optimizer, and the same on a busy machine as on an idle one.

    python benchmarks/diagonal.py
    python benchmarks/diagonal.py --parameters 10_000_000 --repeats 100
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
import trees
from harness import machine, program, report, turns
from rich.console import Console
from rich.progress import track

import rootfree_optax as rf

REFERENCE = "optax.adamw"
BATCH_SIZE = 256

METHODS = {
    "optax.adamw": optax.adamw(1e-3),
    "optax.rmsprop": optax.rmsprop(1e-3),
    "optax.sgd": optax.sgd(1e-3),
    "rf_rmsprop": rf.rf_rmsprop(1e-3, momentum=None, batch_size=BATCH_SIZE),
    "rf_rmsprop, momentum": rf.rf_rmsprop(1e-3, momentum=0.9, batch_size=BATCH_SIZE),
    "rf_adamw": rf.rf_adamw(1e-3, batch_size=BATCH_SIZE),
    "rf_rmsprop, bfloat16": rf.rf_rmsprop(1e-3, momentum=None, batch_size=BATCH_SIZE, accumulator_dtype=jnp.bfloat16),
    "rf_adamw, bfloat16": rf.rf_adamw(1e-3, batch_size=BATCH_SIZE, accumulator_dtype=jnp.bfloat16),
}

COLUMNS = (
    report.Column("method", "method"),
    report.Column("state_ratio", "state\n/params", ".3f"),
    report.Column("traffic_ratio", "traffic\n/params", ".2f"),
    report.Column("median_seconds", "median\nms", ".1f", 1e3),
    report.Column("median_ratio", "median\n/adamw", ".2f"),
    report.Column("fastest_seconds", "fastest\nms", ".1f", 1e3),
    report.Column("fastest_ratio", "fastest\n/adamw", ".2f"),
)


def transformer_shapes(parameters: int) -> dict[str, Any]:
    """Returns the shapes of the smallest transformer, of widths 64, 128, …, with at least so many parameters.

    Its depth and vocabulary grow with its width d: d / 64 layers, 32·d words.
    """
    width, shapes = 64, _shapes_of_width(64)
    while trees.size(shapes) < parameters:
        width += 64
        shapes = _shapes_of_width(width)
    return shapes


def _shapes_of_width(width: int) -> dict[str, Any]:
    layer = {
        "attention": {"query_key_value": (width, 3 * width), "output": (width, width)},
        "feedforward": {"up": (width, 4 * width), "up_bias": (4 * width,), "down": (4 * width, width)},
        "norms": {"attention": (width,), "feedforward": (width,)},
    }
    layers = {f"layer_{index}": layer for index in range(width // 64)}
    return {"embedding": (32 * width, width), **layers, "final_norm": (width,)}


def measure(shapes: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Returns one record per method."""
    gradients = trees.normal(shapes, 1e-2)
    parameter_bytes = program.tree_bytes(gradients)
    watch = functools.partial(track, console=Console(stderr=True), transient=True)
    carries, programs, state_bytes = {}, {}, {}
    for name in watch(list(METHODS), description="compiling"):
        tx, params = METHODS[name], trees.normal(shapes, 1.0)
        carries[name] = (params, tx.init(params))
        state_bytes[name] = program.tree_bytes(carries[name][1])
        programs[name] = program.compile_step(functools.partial(program.optimizer_step, tx), carries[name], gradients)

    steps = {name: turns.timed(compiled.run, carries.pop(name)) for name, compiled in programs.items()}
    times = turns.take_turns(steps, repeats, 1, functools.partial(watch, description="timing"))
    spreads = {name: turns.spread(of_method) for name, of_method in times.items()}
    reference = spreads[REFERENCE]
    return [
        {
            "method": name,
            "state_bytes": state_bytes[name],
            "state_ratio": state_bytes[name] / parameter_bytes,
            **programs[name].cost(),
            "traffic_ratio": programs[name].traffic_over(parameter_bytes),
            **spread.seconds(),
            "median_ratio": spread.median / reference.median,
            "fastest_ratio": spread.fastest / reference.fastest,
        }
        for name, spread in spreads.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=50_000_000, help="at least so many parameters (%(default)s)")
    parser.add_argument("--repeats", type=int, default=60, help="timed rounds (%(default)s)")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results" / "diagonal.json",
        help="the JSON file (benchmarks/results/diagonal.json)",
    )
    options = parser.parse_args(arguments)

    description = machine.describe()
    shapes = transformer_shapes(options.parameters)
    settings = {
        "parameters": trees.size(shapes),
        "arrays": len(trees.shapes_of(shapes)),
        "dtype": "float32",
        "repeats": options.repeats,
    }
    records = measure(shapes, options.repeats)
    report.write_json(options.output, machine=description, settings=settings, records=records)
    report.show(
        Console(),
        f"One step on {settings['parameters'] / 1e6:.1f} million float32 parameters in {settings['arrays']} arrays, "
        f"{options.repeats} repeats",
        machine.summary(description),
        COLUMNS,
        records,
    )


if __name__ == "__main__":
    main()

"""Program size, compile time, state and speed of inverse-free Shampoo, beside Optax's optimizers and the official code.

Every ratio is between methods of one run. The sections, all of them by default:

    program  StableHLO lines and compile time of a transformer's step, at several depths, beside optax.adamw
    state    bytes of the optimizer's state for each structure of the factors, beside Adam's
    speed    time of a step with and without refresh, beside the official PyTorch SIRFShampoo

The official code runs in an environment of its own, which --official-python names:

    python -m venv official && official/bin/pip install torch sirfshampoo singd
    python benchmarks/kronecker.py speed --official-python official/bin/python

Without it, its row is left out, and the ratios to it. Both get as many threads as this process has processors; to
compare on one, run `taskset -c 0 python benchmarks/kronecker.py speed …`.
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import trees
from harness import machine, report
from rich.console import Console
from rich.progress import track
from sections import program, speed, state

SECTIONS = ("program", "state", "speed")
STATE_TREES = {
    "gpt": lambda options: trees.gpt(options.layers, options.width),
    "resnet18": lambda options: trees.resnet(18, options.width // 4),
    "resnet34": lambda options: trees.resnet(34, options.width // 4),
}


def _watch(description: str) -> Any:
    return functools.partial(track, description=description, console=Console(stderr=True), transient=True)


def _show_and_write(
    options: argparse.Namespace,
    name: str,
    title: str,
    section: Any,
    settings: dict[str, Any],
    records: Sequence[dict[str, Any]],
) -> None:
    description = machine.describe()
    path = options.output / f"kronecker_{name}.json"
    report.write_json(path, machine=description, settings=settings, records=records)
    caption = section.CAPTION.format(**settings) + "\n" + machine.summary(description)
    report.show(Console(), title, caption, section.COLUMNS, records)


def run_program(options: argparse.Namespace) -> None:
    """Measures program size and compile time."""
    settings = {"width": options.width, "depths": options.depths, "repeats": options.compilations}
    records = program.measure(options.depths, options.width, options.compilations, watch=_watch("compiling"))
    _show_and_write(options, "program", program.TITLE.format(**settings), program, settings, records)


def run_state(options: argparse.Namespace) -> None:
    """Measures the bytes of the state."""
    for tree, make_shapes in STATE_TREES.items():
        shapes = make_shapes(options)
        settings = {"tree": tree, "parameters": trees.size(shapes) / 1e6, "block_size": options.block_size}
        records = state.measure(shapes, options.block_size)
        _show_and_write(options, f"state_{tree}", state.TITLE.format(**settings), state, settings, records)


def run_speed(options: argparse.Namespace) -> None:
    """Measures the time of a step."""
    shapes = trees.gpt(options.layers, options.width, options.vocabulary)
    records, versions = speed.measure(shapes, options.periods, options.official_python, watch=_watch("timing"))
    settings = {
        "layers": options.layers,
        "width": options.width,
        "parameters": trees.size(shapes) / 1e6,
        "periods": options.periods,
        "threads": speed.threads(),
        "official": versions,
    }
    _show_and_write(options, "speed", speed.TITLE.format(**settings), speed, settings, records)
    if options.official_python is None:
        Console().print("Without --official-python there is no row of the official SIRFShampoo, and no ratio to it.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen sections: each prints its tables and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"any of {', '.join(SECTIONS)} (all)")
    parser.add_argument("--official-python", help="the interpreter of an environment with torch and sirfshampoo")
    parser.add_argument("--layers", type=int, default=4, help="depth for state and speed (%(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 24, 48], help="for program (4 24 48)")
    parser.add_argument("--width", type=int, default=256, help="of the transformer (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="of the transformer, for speed (%(default)s)")
    parser.add_argument("--block-size", type=int, default=256, help="of the factors, for state (%(default)s)")
    parser.add_argument("--compilations", type=int, default=3, help="of each program (%(default)s)")
    parser.add_argument("--periods", type=int, default=12, help=f"of {speed.PERIOD} steps, for speed (%(default)s)")
    default_output = pathlib.Path(__file__).parent / "results"
    parser.add_argument("--output", type=pathlib.Path, default=default_output, help="folder (benchmarks/results)")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"sections must be among {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    runs = {"program": run_program, "state": run_state, "speed": run_speed}
    for name in options.sections or SECTIONS:
        runs[name](options)


if __name__ == "__main__":
    main()

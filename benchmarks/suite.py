"""Every method on every tree, beside psgd's Kron, SOAP, Distributed Shampoo, Muon and AdamW: a table, a figure, JSON.

    python benchmarks/suite.py                     # the trees gpt4, resnet18 and vit, all methods that are installed
    python benchmarks/suite.py --trees gpt12 resnet34 --methods adamw muon "sirf_muon*"
    python benchmarks/suite.py --trees share       # the optimizer's share of a training step
    python benchmarks/suite.py --trees cost        # compilation and temporaries on trees of many shapes
    python benchmarks/suite.py --trees report      # all records as one Markdown page, costs.md; runs nothing

The peers are installed as `harness/peers.py` says, PyTorch's official optimizer in an environment of its own:

    python -m venv official && official/bin/pip install torch sirfshampoo singd
    python benchmarks/suite.py --official-python official/bin/python

One that is absent or broken is in the table, with the reason. On two processor cores gpt48 takes psgd and SOAP minutes
to compile, so name them only with that time at hand.

On a GPU the same commands run there. JAX_DEFAULT_MATMUL_PRECISION, `tensorfloat32` or `highest`, says how float32 is
multiplied, which the JSON records. A method compiles for 5 to 30 seconds there, so name a few of them at a time:

    python benchmarks/suite.py --trees gpt124M --methods adamw muon sirf_muon kl_shampoo

On Linux processors, arrays of more than 32 MB are mapped anew at every step, and paging them in takes a tenth to a
third of a product of such. `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` has it done in large pages, for every method alike;
the JSON says whether it was set.

The JSON is written after every method that is compiled, so that what a run has found outlives it.
"""

import argparse
import fnmatch
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import trees
from harness import figure, machine, official, report
from rich.console import Console
from rich.progress import track
from sections import cost, share, suite, suite_report

TREES: dict[str, Callable[[], trees.Shapes]] = {
    **{f"gpt{layers}": functools.partial(trees.gpt, layers) for layers in (4, 12, 48)},
    **{f"resnet{depth}": functools.partial(trees.resnet, depth) for depth in (18, 34)},
    "vit": functools.partial(trees.vit, 12),
    "gpt124M": lambda: trees.gpt(12, 768, vocabulary=50304, context=1024),
}
SHARE, COST, REPORT = "share", "cost", "report"
# Two realistic sizes of model and batch: (layers, width, tokens a step).
TRAINING = ((4, 256, 4096), (2, 512, 4096))


def run_tree(options: argparse.Namespace, tree: str, watch: Any) -> None:
    """Measures all chosen methods on one tree."""
    shapes = TREES[tree]()
    settings = {
        "tree": tree,
        "parameters": trees.size(shapes) / 1e6,
        "block_size": options.block_size,
        "periods": options.periods,
        "threads": official.threads(),
        "where": jax.devices()[0].device_kind if machine.on_accelerator() else f"{official.threads()} threads",
        "float32_products": jax.config.jax_default_matmul_precision or "the backend's default",
    }
    records = suite.measure(
        shapes,
        options.methods,
        block_size=options.block_size,
        periods=options.periods,
        official_python=options.official_python,
        watch=watch,
        prepared=functools.partial(_write, options, f"suite_{tree}", settings),
    )
    description = _write(options, f"suite_{tree}", settings, records)
    caption = suite.CAPTION.format(**settings) + "\n" + machine.summary(description)
    report.show(Console(), suite.TITLE.format(**settings), caption, suite.time_columns(), records)
    title = suite.PROGRAM_TITLE.format(**settings)
    report.show(Console(), title, suite.PROGRAM_CAPTION, suite.PROGRAM_COLUMNS, records)
    figure.draw(options.output / f"suite_{tree}.png", suite.TITLE.format(**settings), records)
    for record in records:
        if "problem" in record:
            Console().print(f"{record['method']}: {record['problem']}", markup=False, highlight=False)


def run_share(options: argparse.Namespace, watch: Any) -> None:
    """Measures the optimizer's share of a training step, at two sizes."""
    for layers, width, tokens in TRAINING:
        settings = {"layers": layers, "width": width, "tokens": tokens, "block_size": options.block_size}
        records = share.measure(
            layers, width, tokens, block_size=options.block_size, periods=options.periods, watch=watch
        )
        caption = share.CAPTION + "\n" + machine.summary(_write(options, f"share_{layers}x{width}", settings, records))
        report.show(Console(), share.TITLE.format(**settings), caption, share.COLUMNS, records)


def _write(
    options: argparse.Namespace, name: str, settings: dict[str, Any], records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the JSON and returns the machine's description."""
    description = machine.describe()
    report.write_json(options.output / f"{name}.json", machine=description, settings=settings, records=records)
    return description


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen trees: each prints its table and writes its JSON and figure when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*TREES, SHARE, COST, REPORT]
    parser.add_argument("--trees", nargs="+", default=["gpt4", "resnet18", "vit"], choices=choices, metavar="TREE")
    parser.add_argument(
        "--methods", nargs="+", default=["*"], metavar="METHOD", help="names or patterns, 'sirf_*' (all)"
    )
    parser.add_argument("--official-python", help="the interpreter of an environment with torch and sirfshampoo")
    parser.add_argument("--block-size", type=int, default=512, help="of blocks (%(default)s)")
    parser.add_argument("--periods", type=int, default=6, help="of 10 steps (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    known = suite.names()
    found = {pattern: [name for name in known if fnmatch.fnmatchcase(name, pattern)] for pattern in options.methods}
    if unknown := [pattern for pattern, names in found.items() if not names]:
        parser.error(f"methods must be among {', '.join(known)}, got {', '.join(unknown)}")
    options.methods = [name for names in found.values() for name in names]
    for tree in options.trees:
        console = Console(stderr=True)
        watch = functools.partial(track, description=tree, console=console, transient=True)
        if tree == REPORT:
            Console().print(f"Wrote {suite_report.write(options.output)}")
        elif tree == SHARE:
            run_share(options, watch)
        elif tree == COST:
            records = list(watch(cost.measure()))
            caption = cost.CAPTION + "\n" + machine.summary(_write(options, COST, {}, records))
            report.show(Console(), cost.TITLE, caption, cost.COLUMNS, records)
        else:
            run_tree(options, tree, watch)


if __name__ == "__main__":
    main()

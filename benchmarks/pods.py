"""Programs of one optimizer step for TPU pods, compiled ahead of time, without a TPU, beside other optimizers.

Needs `pip install -e '.[tpu]'`; with psgdax, psgd's update is among the methods. The sections, all by default:

    balance how evenly the stacks of each decoder divide over chips; compiles nothing, and needs no libtpu
    blocks  the 144 blocks of 12 layers of width 768 on v5e:4x4, in float32 and with bfloat16 factors
    update  the optimizer's update of decoders of 125 million to 70 billion parameters, gradients given
    step    a whole training step, sequences of 2048 tokens, one for each chip
    report  all records of the last two as one Markdown page, pods.md; compiles nothing

    python benchmarks/pods.py blocks
    python benchmarks/pods.py update --trees 7B --methods adamw "published, T=10" sirf_muon

Each table is written to a JSON file of its own, after every program. A method that the compiler refuses, as where a
chip's memory is too small, is recorded with the reason.
"""

import argparse
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# Before jax is imported: the programs are for chips that this machine does not have, and it asks nobody for them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import trees
from decoders import DECODERS
from harness import machine, report
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track
from sections import pods, pods_report

import rootfree_optax as rf

SECTIONS = ("balance", "blocks", "update", "step", "report")
DEFAULT_METHODS = ("adamw", "sirf_muon", "published, T=10")


def _write(options: argparse.Namespace, name: str, settings: dict[str, Any], records: Any) -> None:
    path = options.output / f"pods_{name}.json"
    report.write_json(path, machine=machine.describe(), settings=settings, records=records)


def _show(settings: dict[str, Any], records: Any) -> None:
    caption = f"{pods.CAPTION}\nCompiled on {machine.summary(machine.describe())}"
    report.show(Console(), pods.TITLE.format(**settings), caption, pods.COLUMNS, records)


def _watch(names: Sequence[str], description: str) -> Any:
    return track(names, description=description, console=Console(stderr=True), transient=True)


def run_balance(options: argparse.Namespace) -> None:
    """Counts blocks, in halved ones as well where those of the decoder's size are too few for so many chips."""
    records = []
    for tree in options.trees:
        decoder = DECODERS[tree]
        for chips in (16, 256, 512):
            block_size, uneven = decoder.block_size, True
            while uneven:
                layout = rf.Layout(block_size=block_size, layer_axes={"^layers/": 0}, factor_dtype=jnp.bfloat16)
                layout = pods.factors_everywhere(layout)
                told = pods.balance(layout.plan(trees.abstract(decoder.shapes)), chips)
                records.append({"tree": tree, "chips": chips, "block_size": block_size, **told})
                block_size, uneven = block_size // 2, told["busiest"] > pods.EVEN
    description = machine.describe()
    report.write_json(options.output / "pods_balance.json", machine=description, settings={}, records=records)
    report.show(Console(), pods.BALANCE_TITLE, pods.BALANCE_CAPTION, pods.BALANCE_COLUMNS, records)


def run_blocks(options: argparse.Namespace) -> None:
    """Compiles the update of 144 blocks."""
    topology, sizes = "v5e:4x4", (16,)
    mesh = pods.mesh_of(topology, sizes)
    shapes = pods.stack_of_layers()
    params = pods.placed(shapes, pods.layer_specs(), mesh)
    records = []
    for name in _watch(["float32", "bfloat16"], "144 blocks"):
        layout = pods.factors_everywhere(rf.Layout(block_size=768, factor_dtype=name))
        transformation = rf.published.scale_by_sirf_shampoo(
            batch_size=256, layout=layout, mesh_axes=mesh.axis_names, refresh_every=10
        )
        record = pods.measure(transformation, params, layout, apply=False)
        shard = record["gradient_bytes"]
        records.append(
            {
                "method": f"published, {name}",
                **record,
                "flops_ratio": record["product_flops"] / record["plan_flops"],
                "temporary_ratio": record["temporary_bytes"] / (2 * shard),
            }
        )
    settings = {
        "program": "The direction",
        "tree": "12-layer",
        "topology": topology,
        "mesh": "16",
        "parameters": trees.size(shapes) / 1e9,
    }
    _write(options, "blocks", settings, records)
    _show(settings, records)


def run_trees(options: argparse.Namespace, *, whole_step: bool) -> None:
    """Compiles the update, or a whole step, of the decoders."""
    for tree in options.trees:
        decoder = DECODERS[tree]
        for topology, sizes in pods.PODS[tree]:
            across = "x".join(map(str, sizes))
            if options.meshes and across not in options.meshes:
                continue
            mesh = pods.mesh_of(topology, sizes)
            specs = decoder.specs("data", "model" if len(sizes) > 1 else None)
            params = pods.placed(decoder.shapes, specs, mesh)
            layout = rf.Layout(layer_axes={"^layers/": 0}, factor_dtype=jnp.bfloat16, specs=params)
            by_sequence = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            tokens = jax.ShapeDtypeStruct((mesh.size, pods.LENGTH + 1), jnp.int32, sharding=by_sequence)
            records = []
            every = pods.methods(layout, mesh.axis_names)
            name = f"{'step' if whole_step else 'update'}_{tree}_{topology.replace(':', '_')}_{len(sizes)}d"
            settings = {
                "program": "A training step" if whole_step else "The update",
                "tree": tree,
                "topology": topology,
                "mesh": across.replace("x", "×"),
                "parameters": trees.size(decoder.shapes) / 1e9,
                "block_size": ", ".join("×".join(map(str, stack.shape)) for stack in layout.plan(params).stacks),
            }
            for method in _watch(options.methods, f"{tree} on {topology} {settings['mesh']}"):
                of_plan = pods.factors_everywhere(layout) if method.startswith("published") else None
                try:
                    record = pods.measure(every[method](), params, of_plan, tokens if whole_step else None)
                except jax.errors.JaxRuntimeError as error:  # the compiler's: a chip's memory is too small, for one
                    record = {"error": str(error).splitlines()[0]}
                records.append({"method": method, **record})
                _write(options, name, settings, records)  # a compilation may take many minutes
            _show(settings, records)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen sections: each prints its tables and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"any of {', '.join(SECTIONS)} (all)")
    parser.add_argument("--trees", nargs="+", choices=DECODERS, default=list(DECODERS), help="(all)")
    parser.add_argument("--meshes", nargs="+", help="of the trees' topologies, as 16x16 (all)")
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, help="adamw muon psgd ... (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    if unknown := set(options.methods) - set(pods.methods(rf.Layout(), ("data",))):
        parser.error(f"unknown or absent methods: {', '.join(sorted(unknown))}")
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"sections must be among {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    runs = {
        "balance": run_balance,
        "blocks": run_blocks,
        "update": functools.partial(run_trees, whole_step=False),
        "step": functools.partial(run_trees, whole_step=True),
        "report": lambda options: Console().print(f"Wrote {pods_report.write(options.output)}"),
    }
    for name in options.sections or SECTIONS:
        runs[name](options)


if __name__ == "__main__":
    main()

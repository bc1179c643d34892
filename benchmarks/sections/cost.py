"""What compiling an update takes, and its memory, beside AdamW: nothing runs and nothing is allocated."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import optax
import trees
from harness import program, report

import rootfree_optax as rf

TITLE = "Tracing, lowering and compiling one update"
CAPTION = (
    "compile: CPU seconds, over all threads. lines: of StableHLO. temp.: what the update needs beside gradients and "
    "state, which are donated, and parameters, over the parameters' bytes."
)
COLUMNS = (
    report.Column("tree", "tree"),
    report.Column("method", "method"),
    report.Column("compile_process_seconds", "compile\ns", ".1f"),
    report.Column("compile_over_adamw", "compile\n/adamw", ".2f"),
    report.Column("stablehlo_lines", "lines", ".0f"),
    report.Column("temporaries_over_parameters", "temp.\n/params", ".2f"),
)
TREES = {
    "10 convolutions": functools.partial(trees.convolutions, 10),
    "30 convolutions": functools.partial(trees.convolutions, 30),
    "unet": trees.unet,
    "mlp": lambda: {"kernels": [(784, 512), (512, 256), (256, 128), (128, 10)], "biases": [(512,), (256,), (128,)]},
    "gpt48": functools.partial(trees.gpt, 48),
    "1,000 arrays": lambda: {"kernels": [(64, 64)] * 500, "biases": [(64,)] * 500},
    "12 linears": lambda: [(2048, 2048)] * 12,
    "6 kernels": lambda: [(3, 3, 384, 384)] * 6,
    "scanned": lambda: {name: (12, 512, width) for name, width in {"qkv": 1536, "out": 512, "fc": 2048}.items()},
    "embedding": lambda: {"embedding": (131_072, 1024)},
}
METHODS = {"adamw": optax.adamw, "rf_adamw": rf.rf_adamw} | {
    name: getattr(rf, name) for name in ("sirf_muon", "sirf_shampoo", "kl_shampoo")
}


def measure() -> Iterator[dict[str, Any]]:
    """Yields one record for each tree and method."""
    for tree, shapes_of in TREES.items():
        params, adamw = trees.abstract(shapes_of()), None
        layout = {"layout": rf.Layout(layer_axes=0)} if tree == "scanned" else {}
        for name, build in METHODS.items():
            tx = build(1e-3, **(layout if name not in ("adamw", "rf_adamw") else {}))
            jax.clear_caches()
            update = lambda carry, params, tx=tx: tx.update(*carry, params)
            cost = program.compile_step(update, (params, jax.eval_shape(tx.init, params)), params).cost()
            adamw = adamw or cost
            temporaries = cost["temporary_bytes"]
            yield {
                "tree": tree,
                "method": name,
                **cost,
                "compile_over_adamw": cost["compile_process_seconds"] / adamw["compile_process_seconds"],
                "temporaries_over_parameters": temporaries and temporaries / program.tree_bytes(params),
            }

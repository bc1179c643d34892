"""Size of the traced program and time to compile it, against depth."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
import trees
from harness import program, published, report

import rootfree_optax as rf

REFERENCE = "adamw"
_SETTINGS = {"batch_size": 256, "update_every": 10, "layout": rf.Layout(block_size=256)}
METHODS = {
    REFERENCE: optax.adamw(1e-3),
    "muon": optax.contrib.muon(1e-3),
    "sirf": rf.sirf_shampoo(1e-3, **_SETTINGS, **published.OPTIMIZER),
    "sirf, bfloat16": rf.sirf_shampoo(1e-3, preconditioner_dtype="bfloat16", **_SETTINGS, **published.OPTIMIZER),
    "sirf, exact": rf.sirf_shampoo(1e-3, **_SETTINGS),
}

TITLE = "Program of one step, gpt of width {width}, factors in blocks of 256, refreshed every 10th step"
CAPTION = (
    "lines: of StableHLO. process: CPU time of tracing and compiling, the least of {repeats}, which other work on the "
    "machine changes least; compile: the same by the clock. /adamw: over optax.adamw's of the same depth."
)
COLUMNS = (
    report.Column("layers", "layers", ".0f"),
    report.Column("method", "method"),
    report.Column("stablehlo_lines", "lines", ".0f"),
    report.Column("lines_ratio", "lines\n/adamw", ".2f"),
    report.Column("compile_process_seconds", "process\ns", ".2f"),
    report.Column("process_ratio", "process\n/adamw", ".2f"),
    report.Column("compile_seconds", "compile\ns", ".2f"),
    report.Column("compile_ratio", "compile\n/adamw", ".2f"),
)
_KEYS = ("stablehlo_lines", "compile_process_seconds", "compile_seconds", "bytes_accessed", "temporary_bytes")


def measure(depths: Sequence[int], width: int, repeats: int, *, watch: Any = iter) -> list[dict[str, Any]]:
    """Returns one record per depth and method; the methods take turns, and a time is the least of its repeats."""
    rounds = [(depth, name) for depth in depths for _ in range(repeats) for name in METHODS]
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for depth, name in watch(rounds):
        cost = _compile(METHODS[name], trees.abstract(trees.gpt(depth, width)))
        known = best.setdefault((depth, name), cost)
        for key in ("compile_process_seconds", "compile_seconds"):
            known[key] = min(known[key], cost[key])
    records = []
    for (depth, name), cost in best.items():
        reference = best[depth, REFERENCE]
        records.append(
            {
                "layers": depth,
                "method": name,
                **{key: cost[key] for key in _KEYS},
                "lines_ratio": cost["stablehlo_lines"] / reference["stablehlo_lines"],
                "process_ratio": cost["compile_process_seconds"] / reference["compile_process_seconds"],
                "compile_ratio": cost["compile_seconds"] / reference["compile_seconds"],
            }
        )
    return records


def _compile(tx: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    jax.clear_caches()
    carry = (params, jax.eval_shape(tx.init, params))
    return program.compile_step(functools.partial(program.optimizer_step, tx), carry, params).cost()

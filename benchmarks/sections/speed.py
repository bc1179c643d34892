"""Time of one step: with refresh, without, and their mean over a period, beside the official PyTorch optimizer."""

import contextlib
import functools
import os
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax
import trees
from harness import official, program, published, report, roofline, turns

import rootfree_optax as rf

OFFICIAL = "official"
WORKER = pathlib.Path(__file__).with_name("official_worker.py")
PERIOD = 10
BATCH_SIZE = 32
LAYOUTS = {
    "dense": rf.Layout(structure="dense"),
    "default": rf.Layout(),
    "blocks": rf.Layout(block_size=256),
}
CACHED = " *"
OTHERS = {"adamw": optax.adamw(1e-3), "muon": optax.contrib.muon(1e-3)}
# The official optimizer's arguments, and what they are called here.
OFFICIAL_SETTINGS = {
    "lr": 1e-3,
    "beta2": 1e-2,
    "alpha1": 0.9,
    "alpha2": 0.5,
    "lam": 1e-3,
    "kappa": 0.0,
    "T": PERIOD,
    "batch_size": BATCH_SIZE,
}

TITLE = "One step on gpt: {layers} layers, width {width}, {parameters:.2f} million parameters, {threads} threads"
CAPTION = (
    "official: SIRFShampoo in PyTorch, dense factors on every axis, vectors' too. dense, default, blocks: "
    "rf.sirf_shampoo with the same arguments and such a layout (blocks of 256), the first of them the same "
    "mathematics. *: with K Kᵀ cached in the state. adamw, muon: Optax's. refresh, plain: medians of steps with and "
    f"without refresh; mean: over the {PERIOD} steps of a period. ratio, min, CPU: mean over the official's, by "
    "medians, by fastest steps, and by the CPU time of all threads. /roof: fastest steps over the time that the plan's "
    "operations take at the rate of single batched products of the same shapes. The programs take turns, step by step."
)
COLUMNS = (
    report.Column("method", "method"),
    report.Column("refresh_seconds", "refresh\nms", ".1f", 1e3),
    report.Column("plain_seconds", "plain\nms", ".1f", 1e3),
    report.Column("mean_seconds", "mean\nms", ".1f", 1e3),
    report.Column("mean_ratio", "mean\nratio", ".3f"),
    report.Column("fastest_ratio", "min\nratio", ".3f"),
    report.Column("process_ratio", "CPU\nratio", ".3f"),
    report.Column("refresh_over_roofline", "refresh\n/roof", ".2f"),
    report.Column("plain_over_roofline", "plain\n/roof", ".2f"),
)


def threads() -> int:
    """Returns how many threads every program gets: as many as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def official_request(shapes: trees.Shapes, *, preconditioner_dtype: str | None = None) -> dict[str, Any]:
    """Returns what the official optimizer is asked: these shapes, on JAX's own kind of device, as precise in float32.

    Args:
      shapes: the parameters'.
      preconditioner_dtype: of the factors; None is the parameters'.

    Raises:
      ValueError: on an accelerator that PyTorch is not timed on.
    """
    backend = jax.default_backend()
    devices = {"cpu": "cpu", "gpu": "cuda"}
    if backend not in devices:
        raise ValueError(f"the official optimizer runs on cpu and gpu, got {backend!r}. Leave out --official-python.")
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return {
        "shapes": trees.shapes_of(shapes),
        "settings": OFFICIAL_SETTINGS,
        "preconditioner_dtype": preconditioner_dtype,
        "threads": threads(),
        "device": devices[backend],
        "float32_products": "highest" if exact or backend == "cpu" else "high",
    }


def measure(
    shapes: trees.Shapes, periods: int, official_python: str | None, *, watch: Any = iter
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns one record per method, and the versions of the official packages.

    Args:
      shapes: the parameters'.
      periods: how many periods are timed, after one that is not.
      official_python: the interpreter that has the official package; None leaves that row out.
      watch: wraps the iterable of steps, for a progress bar.
    """
    versions: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        steps: dict[str, turns.Step] = {}
        if official_python is not None:
            worker = stack.enter_context(official.worker(official_python, WORKER))
            versions = worker.ask(official_request(shapes))["versions"]
            steps[OFFICIAL] = functools.partial(official_step, worker)
        steps |= {name: _jax_step(tx, shapes) for name, tx in (_ours() | OTHERS).items()}
        times = turns.take_turns(steps, periods, PERIOD, watch)
    records = [{"method": name, **_summary(seconds)} for name, seconds in times.items()]
    for record in records:
        _compare(record, records[0] if official_python else None)
        layout = LAYOUTS.get(record["method"].removesuffix(CACHED))
        if layout is not None:
            cached = record["method"].endswith(CACHED)
            _add_roofline(record, layout.plan(trees.abstract(shapes)), cached=cached)
    return records, versions


def _ours() -> dict[str, optax.GradientTransformation]:
    settings = published.OPTIMIZER | {
        "preconditioner_lr": OFFICIAL_SETTINGS["beta2"],
        "momentum": OFFICIAL_SETTINGS["alpha1"],
        "riemannian_momentum": OFFICIAL_SETTINGS["alpha2"],
        "damping": OFFICIAL_SETTINGS["lam"],
        "update_every": PERIOD,
        "batch_size": BATCH_SIZE,
    }
    learning_rate = OFFICIAL_SETTINGS["lr"]
    return {
        name + suffix: rf.sirf_shampoo(learning_rate, layout=layout, cache_products=bool(suffix), **settings)
        for name, layout in LAYOUTS.items()
        for suffix in ("", CACHED)
    }


def official_step(worker: official.Worker, count: int) -> turns.Seconds:
    """Makes so many steps of the official optimizer."""
    answer = worker.ask({"steps": count})
    return answer["seconds"], answer["process_seconds"]


def _jax_step(tx: optax.GradientTransformation, shapes: trees.Shapes) -> turns.Step:
    gradients, params = trees.normal(shapes, 1e-2), trees.normal(shapes, 1.0)
    carry = (params, tx.init(params))
    run = program.compile_step(functools.partial(program.optimizer_step, tx), carry, gradients).run
    return turns.timed(run, carry)


def _summary(periods: list[list[turns.Seconds]]) -> dict[str, float]:
    """Returns the medians by the clock, and the means over a period of medians, of fastest steps and of CPU time."""
    times = {"refresh": [period[0] for period in periods], "plain": [pair for period in periods for pair in period[1:]]}
    clock = {kind: [seconds for seconds, _ in pairs] for kind, pairs in times.items()}
    process = {kind: statistics.median(seconds for _, seconds in pairs) for kind, pairs in times.items()}
    median = {kind: statistics.median(seconds) for kind, seconds in clock.items()}
    fastest = {kind: min(seconds) for kind, seconds in clock.items()}
    mean = lambda seconds: (seconds["refresh"] + (PERIOD - 1) * seconds["plain"]) / PERIOD
    return {
        **{f"{kind}_seconds": value for kind, value in median.items()},
        **{f"{kind}_fastest_seconds": value for kind, value in fastest.items()},
        **{f"{kind}_process_seconds": value for kind, value in process.items()},
        "mean_seconds": mean(median),
        "mean_fastest_seconds": mean(fastest),
        "mean_process_seconds": mean(process),
    }


def _compare(record: dict[str, Any], reference: dict[str, Any] | None) -> None:
    if reference is None:
        return
    for ratio, key in (("mean", "mean"), ("fastest", "mean_fastest"), ("process", "mean_process")):
        record[f"{ratio}_ratio"] = record[f"{key}_seconds"] / reference[f"{key}_seconds"]


def _add_roofline(record: dict[str, Any], plan: rf.Plan, *, cached: bool) -> None:
    """Adds the time that the plan's operations take at the products' rates, and how many times that was measured."""
    floors = roofline.floors(plan, dtype=jnp.float32, cached=cached, step_bytes=0)
    for kind in ("refresh", "plain"):
        value = floors[f"{kind}_floor_seconds"]
        record[f"{kind}_roofline_seconds"] = value
        record[f"{kind}_over_roofline"] = record[f"{kind}_fastest_seconds"] / value

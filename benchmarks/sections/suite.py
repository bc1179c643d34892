"""Every method on one tree: time, compilation, memory, and how far from the least time possible."""

import contextlib
import functools
import sys
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
import trees
from harness import busy, machine, official, peers, program, report, roofline, turns

import rootfree_optax as rf
from sections import methods

TITLE = "{tree}: {parameters:.2f} million parameters, {where}"
CAPTION = (
    "This library's methods in blocks of at most {block_size}; refreshed at every 10th step unless T=1. cached: with "
    "K Kᵀ in the state. official: SIRFShampoo in PyTorch, whole axes, T=10; official blocks: each block, of vectors "
    "too, is a parameter. muon: Optax's, which takes parameters of two axes alone for matrices. soap, block rule: as a "
    "rule of this library, in blocks; soap, T=10 keeps the second moment of the old basis when that turns, a known "
    "defect. mean, max: of the steps of a period, medians over periods; an accelerator is not waited for between "
    "steps. /floor: step with and without refresh over the least time that the products, at the measured rate of such "
    "products, or the bytes, at that of a copy, take. rate: what the products of the refresh alone would take, of what "
    "it adds to a step. busy: how long the accelerator's kernels run. The methods take turns."
)
TIME_COLUMNS = (
    report.Column("method", "method"),
    report.Column("mean_seconds", "mean\nms", ".1f", 1e3),
    report.Column("mean_over_adamw", "mean\n/adamw", ".1f"),
    report.Column("max_seconds", "max\nms", ".1f", 1e3),
    report.Column("busy_seconds", "busy\nms", ".1f", 1e3),
    report.Column("busy_over_adamw", "busy\n/adamw", ".1f"),
    report.Column("refresh_over_floor", "refr.\n/floor", ".2f"),
    report.Column("plain_over_floor", "plain\n/floor", ".2f"),
    report.Column("refresh_of_rate", "rate\n%", ".0f", 1e2),
)


def time_columns() -> list[report.Column]:
    """Returns the columns of the times: where steps do not wait, how long kernels run in place of the slowest step."""
    other_place = "max" if machine.on_accelerator() else "busy"
    return [column for column in TIME_COLUMNS if not column.key.startswith(other_place)]


PROGRAM_TITLE = "{tree}: what compiling takes, and memory"
PROGRAM_CAPTION = "lines: of StableHLO. temp.: what a step needs besides parameters, gradients and state."
PROGRAM_COLUMNS = (
    report.Column("method", "method"),
    report.Column("compile_seconds", "compile\ns", ".1f"),
    report.Column("stablehlo_lines", "lines", ".0f"),
    report.Column("temporary_bytes", "temp.\nMB", ".0f", 1e-6),
    report.Column("state_bytes", "state\nMB", ".0f", 1e-6),
)


# Whether the blocks are its parameters, and its factors' dtype.
OFFICIALS = {
    "official": (False, None),
    "official blocks": (True, None),
    "official blocks, bf16": (True, "bfloat16"),
}


def names() -> list[str]:
    """Returns the names of all methods, in the table's order."""
    return [*methods.kronecker_methods(1), *methods.other_methods(), *peers.PEERS, *OFFICIALS]


def measure(
    shapes: trees.Shapes,
    chosen: Collection[str],
    *,
    block_size: int,
    periods: int,
    official_python: str | None,
    watch: Any = iter,
    prepared: Callable[[list[dict[str, Any]]], Any] = lambda records: None,
) -> list[dict[str, Any]]:
    """Returns one record per chosen method; one that cannot run has a "problem" in place of figures.

    Args:
      shapes: the parameters'.
      chosen: among `names`.
      block_size: of this library's blocks.
      periods: how many periods of 10 steps are timed, after one that is not.
      official_python: the interpreter that has the official package.
      watch: wraps the iterable of steps, for a progress bar.
      prepared: takes the records so far, once for every method that is compiled and not yet timed.
    """
    kronecker, others = methods.kronecker_methods(block_size), methods.other_methods()
    records: dict[str, dict[str, Any]] = {}
    steps: dict[str, turns.Step] = {}
    with contextlib.ExitStack() as stack:
        for name in (name for name in names() if name in chosen):
            if name in OFFICIALS:
                blocks, dtype = OFFICIALS[name]
                layout = rf.Layout("dense", block_size=block_size, diagonal=None)
                given = _block_shapes(layout.plan(trees.abstract(shapes))) if blocks else shapes
                request = functools.partial(official.request, given, preconditioner_dtype=dtype)
                steps[name], records[name] = _official(stack, request, official_python)
            else:
                make = kronecker[name].make if name in kronecker else functools.partial(others.get, name)
                steps[name], records[name] = _prepare(name, make if name not in peers.PEERS else None, shapes)
            prepared(_named(records))
        steps = {name: step for name, step in steps.items() if step is not None}
        times = turns.take_turns(steps, periods, methods.PERIOD, watch)
    for name, seconds in times.items():
        records[name] |= turns.summary(seconds)
        if (
            machine.on_accelerator()
            and name not in OFFICIALS
            and (kernels := busy.seconds(steps[name], methods.PERIOD))
        ):
            records[name]["busy_seconds"] = kernels / methods.PERIOD
        if name in kronecker:
            _add_floor(records[name], kronecker[name], shapes)
    _compare(records)
    return _named(records)


def _named(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"method": name, **record} for name, record in records.items()]


def _prepare(
    name: str, make: Callable[[], Any] | None, shapes: trees.Shapes
) -> tuple[turns.Step | None, dict[str, Any]]:
    tx, problem = (make(), "") if make else peers.load(name)
    if tx is None:
        return None, {"problem": problem}
    with contextlib.redirect_stdout(sys.stderr):  # psgd's Kron prints its size, which is no part of the tables
        prepared, problem = peers.first_error(functools.partial(_compiled_step, tx, shapes))
    return prepared or (None, {"problem": problem})


def _compiled_step(tx: optax.GradientTransformation, shapes: trees.Shapes) -> tuple[turns.Step, dict[str, Any]]:
    gradients, params = trees.normal(shapes, 1e-2), trees.normal(shapes, 1.0)
    state = tx.init(params)
    copy = lambda tree: jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
    compiled = program.compile_step(functools.partial(program.optimizer_step, tx), (params, state), gradients)
    jax.block_until_ready(compiled.run(copy((params, state))))  # what is broken shows now
    step = turns.timed(compiled.run, copy((params, state)))
    return step, {**compiled.cost(), "state_bytes": program.tree_bytes(jax.eval_shape(tx.init, params))}


def _block_shapes(plan: rf.Plan) -> trees.Shapes:
    """Returns the shape of every block, as a parameter of its own."""
    return {block.name: plan.stacks[block.stack].shape for block in plan.blocks}


def _official(
    stack: contextlib.ExitStack, request: Callable[[], dict[str, Any]], python: str | None
) -> tuple[turns.Step | None, dict[str, Any]]:
    if python is None:
        return None, {"problem": "absent: no --official-python"}
    worker = stack.enter_context(official.worker(python, official.SCRIPT))
    answer, problem = peers.first_error(lambda: worker.ask(request()))
    if answer is None:
        return None, {"problem": problem}
    return functools.partial(official.step, worker), {key: answer[key] for key in ("state_bytes", "versions", "device")}


def _add_floor(record: dict[str, Any], method: methods.Method, shapes: trees.Shapes) -> None:
    params = trees.abstract(shapes)
    flops = rf.describe(method.make(), params).flops
    # Parameters, gradients and what is applied are read or written beside the state.
    moved = 4 * trees.size(shapes) * 3 + record["state_bytes"]
    dtype = method.layout.factor_dtype or jnp.float32
    record |= roofline.floors(method.layout.plan(params), flops, dtype=dtype, step_bytes=moved)
    if method.period == 1:
        record["refresh_over_floor"] = record["mean_seconds"] / record["refresh_floor_seconds"]
    elif method.period == methods.PERIOD:
        for kind in ("refresh", "plain"):
            record[f"{kind}_over_floor"] = record[f"{kind}_seconds"] / record[f"{kind}_floor_seconds"]
        refreshing = record["refresh_seconds"] - record["plain_seconds"]
        if refreshing > 0:
            record["refresh_of_rate"] = record["refresh_products_seconds"] / refreshing


def _compare(records: dict[str, dict[str, Any]]) -> None:
    for kind in ("mean", "busy"):
        reference = records.get("adamw", {}).get(f"{kind}_seconds")
        for record in records.values():
            if reference and f"{kind}_seconds" in record:
                record[f"{kind}_over_adamw"] = record[f"{kind}_seconds"] / reference

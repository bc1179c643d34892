"""The benchmarks run, report what they promise, and the diagonal optimizers keep their promises of size and traffic."""

import contextlib
import io
import json
from typing import Any

import diagonal
import jax
import pytest

COUNT_BYTES = 4

COUNTS = {  # step counts, one per link of a chain that has one
    "rf_rmsprop": 2,
    "rf_rmsprop, momentum": 2,
    "rf_adamw": 3,
    "rf_rmsprop, bfloat16": 2,
    "rf_adamw, bfloat16": 3,
}
STATE_OVER_PARAMETERS = {
    "rf_rmsprop": 1.0,
    "rf_rmsprop, momentum": 2.0,
    "rf_adamw": 2.0,
    "rf_rmsprop, bfloat16": 0.5,
    "rf_adamw, bfloat16": 1.0,
}
# Bytes that one step moves, over AdamW's.
MOST_TRAFFIC = {
    "rf_rmsprop": 0.8,
    "rf_rmsprop, momentum": 1.05,
    "rf_adamw": 1.05,
    "rf_rmsprop, bfloat16": 0.6,
    "rf_adamw, bfloat16": 0.75,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes and prints, on its smallest tree."""
    path = tmp_path_factory.mktemp("results") / "new" / "diagonal.json"
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("COLUMNS", "80")
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # optax.adamw needs it
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        diagonal.main(["--parameters", "1", "--repeats", "2", "--output", str(path)])
    return {**json.loads(path.read_text()), "printed": printed.getvalue()}


def _record(run: dict[str, Any], method: str) -> dict[str, Any]:
    [record] = [record for record in run["records"] if record["method"] == method]
    return record


def test_json_says_what_was_measured_how_and_where(run: dict[str, Any]) -> None:
    assert {"date", "processor", "cores", "device", "jax", "optax", "rootfree-optax"} <= run["machine"].keys()
    assert run["settings"] == {"parameters": 180_672, "arrays": 9, "dtype": "float32", "repeats": 2}
    for record in run["records"]:
        assert 0 < record["fastest_seconds"] <= record["lower_quartile_seconds"] <= record["median_seconds"]
        assert record["median_seconds"] <= record["upper_quartile_seconds"]
        assert {"compile_seconds", "stablehlo_lines", "temporary_bytes"} <= record.keys()


def test_ratios_are_to_adamw(run: dict[str, Any]) -> None:
    adamw = _record(run, "optax.adamw")
    for record in run["records"]:
        assert record["median_ratio"] == pytest.approx(record["median_seconds"] / adamw["median_seconds"], rel=1e-4)
        assert record["fastest_ratio"] == pytest.approx(record["fastest_seconds"] / adamw["fastest_seconds"], rel=1e-4)


def test_table_fits_eighty_columns_uncut(run: dict[str, Any]) -> None:
    lines = run["printed"].splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in run["printed"]
    for column in diagonal.COLUMNS:
        assert all(word in run["printed"] for word in column.heading.split("\n"))
    for record in run["records"]:
        [row] = [line for line in lines if line.strip().startswith(f"{record['method']} ")]
        assert f"{record['state_ratio']:.3f}" in row


@pytest.mark.parametrize("method", COUNTS)
def test_state_is_the_accumulators_and_step_counts_alone(run: dict[str, Any], method: str) -> None:
    parameter_bytes = 4 * run["settings"]["parameters"]
    expected = STATE_OVER_PARAMETERS[method] * parameter_bytes + COUNTS[method] * COUNT_BYTES
    assert _record(run, method)["state_bytes"] == expected


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="older compilers fuse half-precision passes otherwise")
@pytest.mark.parametrize("method", MOST_TRAFFIC)
def test_a_step_moves_no_more_memory_than_promised(run: dict[str, Any], method: str) -> None:
    adamw = _record(run, "optax.adamw")["bytes_accessed"]
    assert _record(run, method)["bytes_accessed"] <= MOST_TRAFFIC[method] * adamw

"""The benchmark of the Kronecker methods runs, and the promises that hold on any machine hold on a small tree."""

import contextlib
import io
import json
import pathlib
import sys
from typing import Any

import jax
import kronecker
import pytest

import rootfree_optax as rf

WIDTH = 16

# Speaks the official worker's protocol, without PyTorch: every refresh takes 2 s, every other step 1 s.
WORKER = """
import json, sys
request = json.loads(sys.stdin.readline())
assert request["shapes"][0] and request["settings"]["T"] == 10 and request["threads"] > 0
print(json.dumps({"versions": {"torch": "0"}, "device": "cpu", "state_bytes": 0}), flush=True)
for index, _ in enumerate(sys.stdin):
    seconds = 1.0 if index % 10 else 2.0
    print(json.dumps({"seconds": seconds, "process_seconds": 2 * seconds}), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes and prints, on its smallest trees, with an imitation of the official program."""
    folder = tmp_path_factory.mktemp("results") / "new"
    script = tmp_path_factory.mktemp("official") / "official_worker.py"
    script.write_text(WORKER)
    arguments = f"--layers 1 --depths 1 2 --width {WIDTH} --vocabulary 32 --block-size 16 --compilations 1 --periods 1"
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("COLUMNS", "80")
        patch.setattr(kronecker.speed, "WORKER", script)
        # Few programs of two stacks each: compiling is what takes the time.
        dense = rf.Layout(structure="dense", block_size=WIDTH)
        sirf = rf.sirf_shampoo(1e-3, batch_size=256, update_every=10, layout=dense)
        patch.setattr(kronecker.program, "METHODS", {"adamw": kronecker.program.METHODS["adamw"], "sirf": sirf})
        patch.setattr(kronecker.speed, "LAYOUTS", {"dense": dense})
        patch.setattr(kronecker.speed, "OTHERS", {"adamw": kronecker.speed.OTHERS["adamw"]})
        patch.setattr(kronecker.state, "STRUCTURES", (None, "triltoeplitz"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # optax.adamw needs it
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        kronecker.main([*arguments.split(), "--official-python", sys.executable, "--output", str(folder)])
    results = {path.stem.removeprefix("kronecker_"): json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {**results, "printed": printed.getvalue()}


def _record(section: dict[str, Any], **keys: Any) -> dict[str, Any]:
    [record] = [record for record in section["records"] if all(record[key] == keys[key] for key in keys)]
    return record


def test_json_says_what_was_measured_how_and_where(run: dict[str, Any]) -> None:
    assert run.keys() - {"printed"} == {"program", "state_gpt", "state_resnet18", "state_resnet34", "speed"}
    for name in run.keys() - {"printed"}:
        assert {"date", "processor", "cores", "jax", "rootfree-optax"} <= run[name]["machine"].keys()
    assert run["program"]["settings"] == {"width": WIDTH, "depths": [1, 2], "repeats": 1}
    assert run["speed"]["settings"]["official"] == {"torch": "0"}


def test_program_is_shorter_than_adamws_and_grows_slower(run: dict[str, Any]) -> None:
    lines = {(record["method"], record["layers"]): record["stablehlo_lines"] for record in run["program"]["records"]}
    growth = {name: lines[name, 2] - lines[name, 1] for name in ("adamw", "sirf")}
    assert 0 < growth["sirf"] <= 0.5 * growth["adamw"]
    record = _record(run["program"], method="sirf", layers=2)
    assert record["lines_ratio"] == pytest.approx(lines["sirf", 2] / lines["adamw", 2], rel=1e-4)
    assert record["compile_process_seconds"] > 0


def test_dense_half_precision_state_is_at_most_half_more_than_adams(run: dict[str, Any]) -> None:
    shapes_bytes = {tree: run[f"state_{tree}"]["settings"]["parameters"] * 8e6 for tree in ("gpt", "resnet18")}
    for tree, adam in shapes_bytes.items():
        record = _record(run[f"state_{tree}"], structure="the default", dtype="bfloat16")
        assert record["state_bytes"] == pytest.approx(record["factor_bytes"] + adam / 2 + 8, rel=1e-5)
        assert record["state_ratio"] <= 1.5
        structured = _record(run[f"state_{tree}"], structure="triltoeplitz", dtype="bfloat16")
        assert structured["factor_bytes"] < 0.25 * record["factor_bytes"]


def test_mean_step_is_the_mean_over_a_period_and_compared_with_the_official(run: dict[str, Any]) -> None:
    official = _record(run["speed"], method="official")
    assert official["refresh_seconds"] == 2.0
    assert official["plain_seconds"] == 1.0
    assert official["mean_seconds"] == pytest.approx(1.1)
    assert official["mean_process_seconds"] == pytest.approx(2.2)
    for record in run["speed"]["records"]:
        mean = (record["refresh_seconds"] + 9 * record["plain_seconds"]) / 10
        assert record["mean_ratio"] == pytest.approx(mean / 1.1, rel=1e-3)
        assert 0 < record["refresh_fastest_seconds"] <= record["refresh_seconds"]
    dense = _record(run["speed"], method="dense")
    assert dense["refresh_over_roofline"] > 0
    assert dense["refresh_roofline_seconds"] > dense["plain_roofline_seconds"]


def test_tables_are_uncut(run: dict[str, Any]) -> None:
    assert max(map(len, run["printed"].splitlines())) <= 80
    assert "…" not in run["printed"]
    for section in (kronecker.program, kronecker.state, kronecker.speed):
        for column in section.COLUMNS:
            assert all(word in run["printed"] for word in column.heading.split("\n"))


def test_a_worker_that_fails_says_why(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('there is no torch')")
    says_why = pytest.raises(RuntimeError, match="there is no torch")
    with kronecker.speed.official.worker(sys.executable, script) as worker, says_why:
        worker.ask({})


def test_unknown_section_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kronecker.main(["sped"])
    assert "sections must be among program, state, speed, got sped" in capsys.readouterr().err

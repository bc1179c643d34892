"""The suite runs every kind of method on a small tree, and says what it could not run and why."""

import json
import sys

import jax
import optax
import pytest
import suite
import trees
from harness import busy, official, peers, roofline, turns

import rootfree_optax as rf


@pytest.mark.research
def test_the_suite_compares_methods_and_names_what_is_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suite.TREES, "gpt4", lambda: trees.gpt(1, 16, 32, 16))
    monkeypatch.setitem(peers.PEERS, "gone", lambda: __import__("a_package_that_is_not_there"))
    longest = max(peers.PEERS, key=len)
    monkeypatch.setitem(peers.PEERS, longest, lambda: optax.sgd(1e-3))
    monkeypatch.setenv("COLUMNS", "80")
    chosen = ["adamw", "published *", "sirf_shampoo, staggered", "gone", longest, "official"]
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        suite.main(["--trees", "gpt4", "--methods", *chosen, "--periods", "1", "--output", str(tmp_path)])
    records = {r["method"]: r for r in json.loads((tmp_path / "suite_gpt4.json").read_text())["records"]}
    assert set(records) == set(chosen)
    assert records["gone"]["problem"] == "absent: No module named 'a_package_that_is_not_there'"
    assert records["official"]["problem"] == "absent: no --official-python"
    assert records["published *"]["plain_over_floor"] > 0
    assert (
        records["published *"]["state_bytes"]
        > records["adamw"]["state_bytes"]
        > 8 * trees.size(trees.gpt(1, 16, 32, 16))
    )
    assert (tmp_path / "suite_gpt4.png").exists()
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "gone: absent" in printed


def test_the_official_optimizer_runs_where_jax_does_and_as_precisely(monkeypatch):
    shapes = {"a": (2, 3)}
    assert official.request(shapes)["device"] == "cpu"
    assert official.request(shapes)["float32_products"] == "highest"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert official.request(shapes)["device"] == "cuda"
    assert official.request(shapes)["float32_products"] == "high"
    with jax.default_matmul_precision("highest"):
        assert official.request(shapes)["float32_products"] == "highest"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="cpu and gpu, got 'tpu'"):
        official.request(shapes)


def test_the_floor_counts_the_products_that_are_made():
    matrix = {"a": jax.ShapeDtypeStruct((128, 128), "float32")}
    plan = rf.Layout(block_size=None).plan(matrix)
    plain = roofline.floors(plan, dtype="float32", cached=False, step_bytes=0)["plain_floor_seconds"]
    cached = roofline.floors(plan, dtype="float32", cached=True, step_bytes=0)["plain_floor_seconds"]
    rate = roofline.product_rate((1, 128, 128), "float32")
    assert plain == pytest.approx(4 * 2 * 128**3 / rate)
    assert cached == pytest.approx(plain / 2)
    moved = roofline.floors(plan, dtype="float32", cached=True, step_bytes=10**12)["plain_floor_seconds"]
    assert moved == pytest.approx(10**12 / roofline.copy_rate())


def test_where_steps_do_not_wait_the_first_is_what_a_period_takes_beyond_the_others(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    counts = []

    def step(count):
        counts.append(count)
        return count + (4.0 if count == 10 else 0.0), 0.0

    [times] = turns.take_turns({"one": step}, periods=2, period=10).values()
    found = turns.summary(times)
    assert counts == 3 * [10, 1, 9]
    assert found["refresh_seconds"] == found["max_seconds"] == 5.0
    assert found["plain_seconds"] == 1.0
    assert found["mean_seconds"] == pytest.approx(1.4)


def test_only_an_accelerator_is_busy():
    step = turns.timed(jax.jit(lambda x: x + 1), jax.numpy.ones(3))
    assert busy.seconds(step, 2) is None


def test_what_is_compiled_is_written_before_it_is_timed(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(suite.TREES, "gpt4", lambda: {"a": (2, 3)})
    monkeypatch.setattr(turns, "take_turns", interrupted)
    with jax.numpy_dtype_promotion("standard"), pytest.raises(KeyboardInterrupt):
        suite.main(["--trees", "gpt4", "--methods", "adamw", "--output", str(tmp_path)])
    [record] = json.loads((tmp_path / "suite_gpt4.json").read_text())["records"]
    assert record["stablehlo_lines"] > 0
    assert "mean_seconds" not in record


def test_periods_are_told_apart():
    seconds = iter([9.0] * 3 + [5.0, 1.0, 1.0] + [5.0, 1.0, 3.0])
    [times] = turns.take_turns({"one": lambda count: (next(seconds), 0.0)}, periods=2, period=3).values()
    found = turns.summary(times)
    assert found["refresh_seconds"] == 5.0
    assert found["plain_seconds"] == 1.0
    assert found["max_seconds"] == 5.0
    assert found["mean_seconds"] == pytest.approx((7 / 3 + 9 / 3) / 2)


# Speaks the official worker's protocol, without PyTorch: every refresh takes 2 s, every other step 1 s.
WORKER = """
import json, sys
request = json.loads(sys.stdin.readline())
assert request["shapes"] == [[2, 3]] and request["settings"]["T"] == 10 and request["threads"] > 0
print(json.dumps({"versions": {"torch": "0"}, "device": "cpu", "state_bytes": 24}), flush=True)
for index, _ in enumerate(sys.stdin):
    seconds = 1.0 if index % 10 else 2.0
    print(json.dumps({"seconds": seconds, "process_seconds": 2 * seconds}), flush=True)
"""


def test_the_official_program_is_timed_in_its_own_environment(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(official, "SCRIPT", script)
    settings = {"block_size": 16, "periods": 2, "official_python": sys.executable}
    [record] = suite.suite.measure({"a": (2, 3)}, ["official"], **settings)
    assert (record["refresh_seconds"], record["plain_seconds"], record["mean_seconds"]) == (2.0, 1.0, 1.1)
    assert record["mean_process_seconds"] == pytest.approx(2.2)
    assert record["state_bytes"] == 24


def test_a_worker_that_fails_says_why(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('there is no torch')")
    says_why = pytest.raises(RuntimeError, match="there is no torch")
    with official.worker(sys.executable, script) as worker, says_why:
        worker.ask({})

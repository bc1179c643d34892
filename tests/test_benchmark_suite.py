"""The suite runs every kind of method on a small tree, and says what it could not run and why."""

import json
import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import suite
import trees
from harness import peers, roofline, turns

import rootfree_optax as rf


def test_the_suite_compares_methods_and_names_what_is_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suite.TREES, "gpt4", lambda: trees.gpt(1, 16, 32, 16))
    monkeypatch.setitem(peers.PEERS, "gone", lambda: __import__("a_package_that_is_not_there"))
    monkeypatch.setenv("COLUMNS", "120")
    chosen = ["adamw", "sirf *", "sirf *, staggered", "gone", "official"]
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        suite.main(["--trees", "gpt4", "--methods", *chosen, "--periods", "1", "--output", str(tmp_path)])
    records = {r["method"]: r for r in json.loads((tmp_path / "suite_gpt4.json").read_text())["records"]}
    assert set(records) == set(chosen)
    assert records["gone"]["problem"] == "absent: No module named 'a_package_that_is_not_there'"
    assert records["official"]["problem"] == "absent: no --official-python"
    assert records["sirf *"]["mean_seconds"] <= records["sirf *"]["max_seconds"]
    assert records["sirf *"]["plain_over_floor"] > 0
    assert records["sirf *"]["state_bytes"] > records["adamw"]["state_bytes"] > 8 * trees.size(trees.gpt(1, 16, 32, 16))
    assert (tmp_path / "suite_gpt4.png").exists()
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "gone: absent" in printed


def test_the_floor_counts_the_products_that_are_made():
    matrix = {"a": jax.ShapeDtypeStruct((128, 128), "float32")}
    plan = rf.Layout().plan(matrix)
    plain = roofline.floors(plan, dtype="float32", cached=False, step_bytes=0)["plain_floor_seconds"]
    cached = roofline.floors(plan, dtype="float32", cached=True, step_bytes=0)["plain_floor_seconds"]
    rate = roofline.product_rate((1, 128, 128), "float32")
    assert plain == pytest.approx(4 * 2 * 128**3 / rate)
    assert cached == pytest.approx(plain / 2)
    moved = roofline.floors(plan, dtype="float32", cached=True, step_bytes=10**12)["plain_floor_seconds"]
    assert moved == pytest.approx(10**12 / roofline.copy_rate())


def test_periods_are_told_apart():
    seconds = iter([9.0] * 3 + [5.0, 1.0, 1.0] + [5.0, 1.0, 3.0])
    [times] = turns.take_turns({"one": lambda: (next(seconds), 0.0)}, periods=2, period=3).values()
    found = turns.summary(times)
    assert found["refresh_seconds"] == 5.0
    assert found["plain_seconds"] == 1.0
    assert found["max_seconds"] == 5.0
    assert found["mean_seconds"] == pytest.approx((7 / 3 + 9 / 3) / 2)

"""The suite runs every kind of method on a small tree, and says what it could not run and why."""

import functools
import json
import sys

import jax
import optax
import pytest
import suite
import trees
from harness import busy, machine, official, peers, program, report, roofline, turns
from sections import methods, suite_report

import rootfree_optax as rf


@pytest.mark.research
def test_the_suite_compares_methods_and_names_what_is_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suite.TREES, "gpt4", lambda: trees.gpt(1, 16, 32, 16))
    monkeypatch.setitem(peers.PEERS, "gone", lambda: __import__("a_package_that_is_not_there"))
    longest = max(peers.PEERS, key=len)
    monkeypatch.setitem(peers.PEERS, longest, lambda: optax.sgd(1e-3))
    monkeypatch.setenv("COLUMNS", "80")
    chosen = ["adamw", "sirf_muon", "sirf_muon, *", "gone", longest, "official"]
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        suite.main(["--trees", "gpt4", "--methods", *chosen, "--periods", "1", "--output", str(tmp_path)])
    records = {r["method"]: r for r in json.loads((tmp_path / "suite_gpt4.json").read_text())["records"]}
    variants = {name for name in suite.suite.names() if name.startswith("sirf_muon, ")}
    assert set(records) == {"adamw", "sirf_muon", "gone", longest, "official"} | variants
    assert records["gone"]["problem"] == "absent: No module named 'a_package_that_is_not_there'"
    assert records["official"]["problem"] == "absent: no --official-python"
    assert records["sirf_muon"]["plain_over_floor"] > 0
    assert "plain_over_floor" not in records["sirf_muon, T=1"]
    of_adam = 8 * trees.size(trees.gpt(1, 16, 32, 16))
    assert records["sirf_muon"]["state_bytes"] > records["adamw"]["state_bytes"] > of_adam
    assert (tmp_path / "suite_gpt4.png").exists()
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "gone: absent" in printed


def test_the_page_shows_what_ran_and_no_column_that_nothing_fills(tmp_path):
    here = machine.describe()
    settings = {"tree": "gpt4", "parameters": 3.8, "where": "2 threads", "block_size": 256}
    records = [
        {"method": "adamw", "mean_seconds": 2e-3, "compile_seconds": 1.5},
        {"method": "gone", "problem": "absent"},
    ]
    report.write_json(tmp_path / "suite_gpt4.json", machine=here, settings=settings, records=records)
    (tmp_path / "suite_gpt4.png").touch()
    compiled = [{"tree": "unet", "method": "adamw", "compile_over_adamw": 1.0}]
    report.write_json(tmp_path / "cost.json", machine=here, settings={}, records=compiled)
    page = suite_report.write(tmp_path).read_text()
    assert (
        "## gpt4: 3.80 million parameters, 2 threads\n\n| method | mean ms |\n| --- | ---: |\n| adamw | 2.0 |\n\n"
        in page
    )
    assert "| method | compile s |\n| --- | ---: |\n| adamw | 1.5 |\n\n" in page
    assert "| unet | adamw | 1.00 |" in page
    assert "](suite_gpt4.png)" in page
    assert "gone" not in page


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


def test_the_floor_counts_the_products_that_are_made(monkeypatch):
    monkeypatch.setattr(roofline, "product_rate", lambda shape, dtype: {(2, 32, 64): 4.0, (1, 16, 16): 1.0}[shape])
    monkeypatch.setattr(roofline, "copy_rate", lambda: 10.0)
    layout = rf.Layout(structure=lambda path, shape: ("dense", "diagonal") if path == "a" else None, block_size=64)
    shapes = {"a": (128, 32), "b": (16, 16), "vector": (5,)}
    plan = layout.plan({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()})
    work = [2 * 2 * 64 * 32 * 64, 2 * 16 * 16 * 16]
    rate = sum(work) / (work[0] / 4 + work[1])
    flops = rf.BlockFlops(observe=10_000, refresh=40_000, precondition=30_000)
    found = roofline.floors(plan, flops, dtype="float32", step_bytes=10)
    assert found["plain_floor_seconds"] == pytest.approx(40_000 / rate)
    assert found["refresh_floor_seconds"] == pytest.approx(80_000 / rate)
    assert found["refresh_products_seconds"] == pytest.approx(40_000 / rate)
    assert roofline.floors(plan, flops, dtype="float32", step_bytes=10**9)["plain_floor_seconds"] == 1e8


def test_every_method_fits_a_model_with_an_embedding_and_a_bias():
    params = trees.abstract({"embedding": (64, 8), "kernel": (8, 24), "bias": (24,)})
    kronecker = {name: method.make() for name, method in methods.kronecker_methods(8).items()}
    loaded = {name: peers.load(name)[0] for name in ("adamw", "muon", "soap, block rule")}
    optimizers = {**kronecker, **methods.other_methods(), **loaded}
    kept = {name: program.tree_bytes(jax.eval_shape(tx.init, params)) for name, tx in optimizers.items()}
    assert min(kept, key=kept.get) == "muon"  # one momentum where the others keep two arrays
    assert kept["sirf_muon, bf16"] < kept["sirf_muon"] == kept["sirf_muon, T=1"]
    assert kept["published.sirf_shampoo"] < kept["published.sirf_shampoo, cached"]


@pytest.mark.research
@pytest.mark.parametrize("name", [*methods.kronecker_methods(8), *methods.other_methods(), "soap, block rule"])
def test_a_step_keeps_shapes_and_dtypes(name):
    params = trees.abstract({"embedding": (64, 8), "kernel": (8, 24), "bias": (24,)})
    known = {**methods.kronecker_methods(8), **methods.other_methods()}
    tx = known.get(name) or peers.load(name)[0]
    tx = tx.make() if isinstance(tx, methods.Method) else tx
    carry = params, jax.eval_shape(tx.init, params)
    after = jax.eval_shape(functools.partial(program.optimizer_step, tx), carry, params)
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert describe(after) == describe(carry)


def test_a_method_that_matches_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        suite.main(["--methods", "adamw", "sirf_nothing*"])
    assert "got sirf_nothing*" in capsys.readouterr().err


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

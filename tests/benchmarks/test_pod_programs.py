"""The benchmark of pods reads programs rightly, and on a real TPU topology the work is divided as promised."""

import importlib.util
import io
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from harness import report
from harness.collectives import traffic
from jax.sharding import AxisType, PartitionSpec
from rich.console import Console
from sections import pods, pods_report

import rootfree_optax as rf

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"

PROGRAM = """
%inner (p: f32[4]) -> f32[4] {
  %a = f32[8,4]{1,0} all-gather(%p), dimensions={0}
}
%kept (p: f32[4]) -> f32[4] {
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %s = (bf16[4,4]{1,0}, bf16[16,4]{1,0}, u32[]) all-gather-start(%p), dimensions={0}
  %d = bf16[16,4]{1,0} all-gather-done(%s)
  %w = f32[4] while(%p), condition=%kept, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %c = f32[4] conditional(%q, %p, %p), branch_computations={%inner, %kept}
}
"""


def test_traffic_counts_loops_by_their_turns_and_knows_what_is_conditional() -> None:
    everything, conditional = traffic(PROGRAM)
    assert everything.count == {"all-gather": 1 + 3 + 1}
    assert everything.size == {"all-gather": 2 * 16 * 4 + 4 * 4 * 8 * 4}
    assert conditional.size == {"all-gather": 4 * 8 * 4}


def test_the_report_shows_every_record_and_what_does_not_compile(tmp_path: pathlib.Path) -> None:
    settings = {"program": "The update", "tree": "7B", "topology": "v5e:16x16", "mesh": "256", "parameters": 7.2}
    records = [{"method": "adamw", "state_bytes": 2.5e6, "collectives": ""}, {"method": "muon", "error": "no memory"}]
    report.write_json(
        tmp_path / "pods_update.json",
        machine={"processor": "P", "cores": 2, "jax": "1", "date": "today"},
        settings={**settings, "block_size": 1024},
        records=records,
    )
    page = pods_report.write(tmp_path).read_text()
    assert "The update of the 7B decoder, 7.20 billion float32 parameters, on v5e:16x16 as 256" in page
    assert "| method | state MB | collectives |\n| --- | ---: | --- |\n| adamw | 2.5 | none |\n" in page
    assert "muon does not compile: no memory" in page


def test_padding_makes_a_chip_busier_than_the_mean() -> None:
    plan = rf.Layout(diagonal=None, block_size=8).plan({"kernel": jax.ShapeDtypeStruct((24, 8), jnp.float32)})
    told = pods.balance(plan, 2)
    assert told["factor_bytes"] == 2 * 2 * 2 * (8 * 8) * 4  # two of three blocks, two factors, two momenta
    assert told["state_ratio"] == told["busiest"] == pytest.approx(4 / 3)


def test_a_program_for_a_mesh_is_measured_on_processors_too() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = pods.placed({"kernel": (64, 64)}, {"kernel": PartitionSpec("data")}, mesh)
    layout = pods.factors_everywhere(rf.Layout(block_size=16))
    record = pods.measure(pods.methods(layout, ("data",))["published"](), params, layout)
    assert record["gradient_bytes"] == 64 * 64 * 4 // 8
    assert record["sent_ratio"] > 0
    assert record["product_flops"] > 0
    assert record["busiest"] == record["state_ratio"] == 1


@pytest.mark.parametrize("width", [60, 120])
def test_a_table_that_is_too_wide_is_turned(width: int) -> None:
    columns = [report.Column("method", "method")]
    columns += [report.Column(f"n{i}", f"quan-\ntity {i}\nMB", ".1f") for i in range(10)]
    records = [{"method": name, **{f"n{i}": 10.0 * i for i in range(10)}} for name in ("first", "second")]
    console = Console(width=width, file=io.StringIO())
    report.show(console, "Title", "Caption.", columns, records)
    printed = console.file.getvalue()
    lines = printed.splitlines()
    assert "…" not in printed
    assert max(map(len, lines)) <= width
    expected = (
        ["quantity", "7", "MB", "70.0", "70.0"] if width == 60 else ["first", *(f"{10 * i:.1f}" for i in range(10))]
    )
    assert expected in [line.split() for line in lines]


SCRIPT = """
import pods
from sections import pods as section
import rootfree_optax as rf

mesh = section.mesh_of("v5e:4x4", (16,))
params = section.placed(section.stack_of_layers(), section.layer_specs(), mesh)
layout = rf.Layout(diagonal=None, block_size=768, factor_dtype="bfloat16")
tx = rf.published.scale_by_sirf_shampoo(batch_size=256, layout=layout, mesh_axes="data", refresh_every=10)
record = section.measure(tx, params, layout, apply=False)
shard = record["gradient_bytes"]
assert abs(record["product_flops"] / record["plan_flops"] - 1) < 0.05, record
assert record["sent_in_refresh"] == 0, record
assert record["sent_ratio"] <= 4, record
assert set(record["collective_counts"]) == {"all-to-all"}, record
assert record["temporary_bytes"] <= 2 * shard, record  # the gradient's shard and a stack's, which is as large
assert record["busiest"] == record["state_ratio"] == 1, record
"""


@pytest.mark.tpu
def test_sixteen_chips_share_the_work_of_144_blocks() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": str(BENCHMARKS)}
    # A process of its own: only one at a time may load libtpu, and this one may have its devices set already.
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

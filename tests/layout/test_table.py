"""The table, as people read it."""

import jax
import jax.numpy as jnp
import pytest

from rootfree_optax._src.layout import Layout, weight_and_bias


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    "head": {"kernel": struct(256, 10), "bias": struct(10)},
    "layers_0": {"mlp": struct(256, 600), "norm": struct(256)},
    "layers_1": {"mlp": struct(256, 600), "norm": struct(256)},
    "temperature": struct(),
}

TABLE = """\
parameter         shape         blocks        structure   state  refresh  apply
───────────────────────────────────────────────────────────────────────────────
head/kernel+bias  256×10 + 10   129×10        dense        67kB    9.31M   717k
                                128×10        dense      65.9kB     9.1M   707k
layers_*/mlp      2 of 256×600  6 of 256×200  dense      2.53MB    1.15G   560M
layers_*/norm     2 of 256      2 of 256      diagonal   2.05kB     4.1k  2.05k
temperature       scalar        1             diagonal       4B        8      4
───────────────────────────────────────────────────────────────────────────────
total             310k          11                       2.67MB    1.17G   562M
11 blocks in 5 stacks. State: 1.07 times Adam's 2.48MB (float32).
Beside it, momentum of gradients or directions is as large as the parameters.
Refresh, apply: floating-point operations, of all factors and all gradients.
The exact refresh takes seven products of a dense factor more than the published one."""


def test_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Layout(block_size=256, group=(weight_and_bias(),)).plan(PARAMS)
    assert plan.table(width=80) == plan.table(width=120) == TABLE
    monkeypatch.setenv("COLUMNS", "80")
    assert str(plan) == TABLE


def test_the_totals_are_the_plans() -> None:
    plan = Layout("dense", factor_dtype="bfloat16").plan({"a": struct(100, 100), "b": struct(100)})
    assert plan.state_bytes() == 3 * 100**2 * 2
    lines = plan.table(width=80).splitlines()
    assert lines[-5].split()[:4] == ["total", "10.1k", "2", "60kB"]
    assert lines[-4] == "2 blocks in 2 stacks. State: 0.74 times Adam's 80.8kB (float32)."


def test_structures_that_differ_are_all_named() -> None:
    table = Layout(("dense", "triltoeplitz")).plan({"a": struct(4, 5)}).table(width=80)
    assert "4×5     dense, triltoeplitz" in table


@pytest.mark.parametrize(
    ("width", "path"),
    [
        (88, "encoder/…/self_attention/query/kernel"),
        (80, "encoder/…/query/kernel"),
        (20, "enc…y/kernel"),
        (200, "encoder/transformer_blocks/0/self_attention/query/kernel"),
    ],
)
def test_long_key_paths_are_shortened_in_the_middle(width: int, path: str) -> None:
    block = [{"self_attention": {"query": {"kernel": struct(64, 64)}}}]
    table = Layout().plan({"encoder": {"transformer_blocks": block}}).table(width=width)
    lines = table.splitlines()
    assert path in [line.split("  ")[0] for line in lines]
    assert max(map(len, lines[:-4])) <= max(width, 62)


def test_numbers_that_agree_stay_in_a_shared_path() -> None:
    params = {"block1": {f"conv2d_{i}": struct(3, 3, 4, 4) for i in range(12)}}
    table = Layout().plan(params).table(width=80)
    assert "block1/conv2d_*  12 of 3×3×4×4" in table


def test_a_table_of_nothing() -> None:
    assert "0 blocks in 0 stacks" in Layout().plan({}).table(width=80)

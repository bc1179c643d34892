"""The table of an optimizer, as people read it, and its numbers, against states and programs themselves."""

import contextlib
import dataclasses
import html.parser
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from meshes import FSDP, draw, mesh_of, shardings_on

import rootfree_optax as rf
from rootfree_optax._src.blocks.curvature import RootFree
from rootfree_optax._src.blocks.rf import CholeskyInverse
from rootfree_optax._src.blocks.sirf import PublishedRefresh
from rootfree_optax._src.transforms import reports


def struct(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def layout_of(structure: Any = None, **others: Any) -> rf.Layout:
    """Returns a layout in which every parameter has factors, and no axis is cut or merged unless that is asked for."""
    return rf.Layout(structure, **{"diagonal": None, "block_size": None, "merge_dims": None, **others})


def published(**others: Any) -> optax.GradientTransformationExtraArgs:
    return rf.scale_by_kronecker(
        PublishedRefresh(), **{"damping": 0.1, "batch_size": None, "layout": layout_of(), **others}
    )


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


PARAMS = {
    "head": {"kernel": struct(256, 10), "bias": struct(10)},
    "layers_0": {"mlp": struct(256, 600), "norm": struct(256)},
    "layers_1": {"mlp": struct(256, 600), "norm": struct(256)},
    "temperature": struct(),
}

TABLE = """\
parameter         shape         blocks        structure  dtype       state
──────────────────────────────────────────────────────────────────────────
head/kernel+bias  256×10 + 10   257×10        dense      bf16, f32   407kB
layers_*/mlp      2 of 256×600  4 of 256×300  dense      bf16, f32  5.68MB
layers_*/norm     2 of 256      2 of 256      diagonal   f32        6.23kB
temperature       scalar        1             diagonal   f32           56B
──────────────────────────────────────────────────────────────────────────
total             310k          8                                    6.1MB
State: 2.46 times Adam's 2.48MB of two numbers for each entry of the parameters.
Step: 686M FLOPs of products, without refresh and statistics.
Refresh: 3.84G FLOPs, every 10 steps.
Statistics: 686M FLOPs, at every step."""


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_golden() -> None:
    layout = layout_of(block_size=300, group=(rf.weight_and_bias(),), factor_dtype={2: (jnp.bfloat16, None)})
    rule = RootFree()
    tx = rf.scale_by_kronecker(rule, layout=layout, refresh_every=10, statistics_every=1, momentum=0.9)
    assert str(rf.describe(tx, PARAMS)) == TABLE


TRANSFORMER = {
    "encoder": {
        "transformer_blocks": [
            {
                "self_attention": {
                    name: {"kernel": struct(256, 256), "bias": struct(256)} for name in ("query", "key", "value", "out")
                },
                "mlp": {"wi": {"kernel": struct(256, 1024), "bias": struct(1024)}, "norm": {"scale": struct(256)}},
            }
        ]
        * 6
    },
    "embed": {"embedding": struct(3000, 256)},
}


@pytest.mark.parametrize("columns", [80, 200])
def test_names_are_whole_and_distinct(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    layout = layout_of(block_size=128, group=(rf.weight_and_bias(),))
    description = rf.describe(published(layout=layout), TRANSFORMER)
    names = dict.fromkeys(row.name for row in description.rows)
    assert len(names) == 7
    assert "encoder/transformer_blocks/*/self_attention/query/kernel+bias" in names
    text = str(description)
    assert all(text.count(f"{name}\n") + text.count(f"{name} ") == 1 for name in names)
    assert max(map(len, text.splitlines())) <= columns


def test_long_cells_break_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rule = rf.scale_by_kronecker(PublishedRefresh(), layout=layout_of(("hierarchical15_15", "triltoeplitz")))
    lines = str(rf.describe(rule, {f"convolution_{i}": {"kernel": struct(40, 50)} for i in range(3)})).splitlines()
    assert max(map(len, lines)) <= 60
    assert [line.split() for line in lines[2:5]] == [
        ["convolution_*/kernel"],
        ["3", "of", "3", "of", "hierarchical15_15,", "f32", "12.5kB"],
        ["40×50", "40×50", "triltoeplitz"],
    ]


def test_names_that_an_asterisk_would_make_equal_stay_distinct() -> None:
    params = {f"layer_{i}": struct(4, 4 + i % 2) for i in range(4)} | {"head_1": struct(4, 4)}
    rows = rf.describe(published(), params).rows
    assert [(row.name, row.parameters) for row in rows] == [
        ("head_1", ("head_1",)),
        ("layer_0, …", ("layer_0", "layer_2")),
        ("layer_1, …", ("layer_1", "layer_3")),
    ]
    assert [
        row.name for row in rf.describe(published(), {f"block1/conv2d_{i}": struct(4, 4) for i in range(12)}).rows
    ] == ["block1/conv2d_*"]


ONE = {"w": struct(6, 4), "b": struct(4), "frozen": struct(3, 3)}
WITHOUT = {"w": True, "b": True, "frozen": False}
LABELS = {"w": "kronecker", "b": "adam", "frozen": "none"}
# Bytes of K and momentum: 6² + 4² + 24 numbers of w, 4 + 4 of b, 3² + 3² + 9 of frozen.
KRONECKER = {"w": 304, "b": 32, "frozen": 108}


@pytest.mark.parametrize(
    ("wrap", "beside", "missing"),
    [
        (lambda tx: tx, {}, ()),
        (lambda tx: optax.chain(optax.clip(1.0), optax.chain(tx, optax.scale(-1.0))), {}, ()),
        (lambda tx: optax.chain(optax.trace(0.9), tx), {"w": 96, "b": 16, "frozen": 36}, ()),
        (lambda tx: optax.masked(tx, WITHOUT), {}, ("frozen",)),
        (
            lambda tx: optax.partition({"kronecker": tx, "adam": optax.adam(0.1), "none": optax.set_to_zero()}, LABELS),
            {"b": 32},
            ("b", "frozen"),
        ),
        (lambda tx: optax.MultiSteps(tx, 4), {"w": 96, "b": 16, "frozen": 36}, ()),
        (lambda tx: optax.apply_if_finite(tx, 5), {}, ()),
        (lambda tx: optax.inject_hyperparams(lambda factor: optax.chain(tx, optax.scale(factor)))(factor=0.5), {}, ()),
        (lambda tx: optax.adamw(0.1), {"w": 192, "b": 32, "frozen": 72}, ("w", "b", "frozen")),
        (lambda tx: rf.scale_by_rf_adam(), {"w": 192, "b": 32, "frozen": 72}, ("w", "b", "frozen")),
    ],
    ids=[
        "alone", "chains", "trace", "masked", "partition", "MultiSteps", "apply_if_finite", "inject_hyperparams",
        "adamw", "rf_adam",
    ],
)  # fmt: skip
def test_bytes_are_those_of_the_whole_state(wrap: Any, beside: dict[str, int], missing: tuple[str, ...]) -> None:
    tx = wrap(published(momentum=0.9))
    description = rf.describe(tx, ONE)
    state = jax.eval_shape(lambda params: tx.init(params), ONE)
    assert description.state_bytes == tree_bytes(state)
    assert description.adam_bytes == 2 * tree_bytes(ONE)
    assert description.adam_ratio == tree_bytes(state) / (2 * tree_bytes(ONE))
    assert description.parameters == 24 + 4 + 9
    rows = {row.name: row for row in description.rows}
    assert rows.keys() == ONE.keys()
    # What a block has beside factors and momentum: four numbers of four bytes.
    expected = {name: 0 if name in missing else KRONECKER[name] + 16 for name in ONE}
    assert {name: row.state_bytes for name, row in rows.items()} == {
        name: size + beside.get(name, 0) for name, size in expected.items()
    }
    counters = description.state_bytes - sum(row.state_bytes for row in description.rows)
    assert counters == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim == 0 or leaf.shape == (1024,)
    )
    for name, row in rows.items():
        blocks, structure, dtype = {
            "w": ("6×4", "dense", "f32"), "b": ("4", "diagonal", "f32"), "frozen": ("3×3", "dense", "f32")
        }[name]  # fmt: skip
        assert (row.blocks, row.structure, row.dtype) == (
            ("", "–", "") if name in missing else (blocks, structure, dtype)
        )


def test_lookahead_counts_the_fast_parameters() -> None:
    params = optax.LookaheadParams(fast=ONE, slow=ONE)
    tx = optax.lookahead(optax.chain(published(), optax.trace(0.9)), 5, 0.5)
    description = rf.describe(tx, params)
    assert description.parameters == 37
    assert description.state_bytes == tree_bytes(jax.eval_shape(lambda params: tx.init(params), params))
    alone = rf.describe(optax.chain(published(), optax.trace(0.9)), ONE)
    assert description.rows == alone.rows


def test_a_tree_of_one_array() -> None:
    description = rf.describe(optax.adamw(0.1), struct(5, 2))
    [row] = description.rows
    assert (row.name, row.shape, row.state_bytes, description.state_bytes) == ("·", "5×2", 80, 84)


def test_adam_is_measured_in_the_parameters_own_dtypes() -> None:
    params = {"half": struct(4, 4, dtype="bfloat16"), "single": struct(3)}
    assert rf.describe(optax.sgd(0.1), params).adam_bytes == 2 * (16 * 2 + 3 * 4)
    [half, single] = rf.describe(published(), params).rows
    assert (half.dtype, single.dtype) == ("bf16", "f32")


def test_parameters_without_factors_say_why() -> None:
    params = {
        "text": {"embed": struct(6, 4)},
        "kernel": struct(4, 5),
        "bias": struct(5),
        "none": struct(0, 3),
        "no": None,
    }
    layout = rf.Layout()
    rows = {row.name: row for row in rf.describe(published(layout=layout, rest=optax.scale_by_adam()), params).rows}
    assert {name: row.structure for name, row in rows.items()} == {
        "text/embed": "no factors: 'embed' in its key path",
        "kernel": "dense",
        "bias": "no factors: a vector or scalar",
        "none": "no factors: no entries",
    }
    assert (rows["text/embed"].state_bytes, rows["bias"].state_bytes, rows["none"].state_bytes) == (8 * 24, 8 * 5, 0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("is_set", [False, True], ids=["on arrays", "set_mesh"])
def test_a_mesh_pads_the_state(kind: AxisType, is_set: bool) -> None:
    mesh = mesh_of(kind, 8)
    params = jax.device_put(draw(0), shardings_on(mesh, FSDP))
    tx = published(layout=layout_of(block_size=4), mesh_axes="data", momentum=0.9)
    compiles = not is_set and kind is AxisType.Explicit
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        description = rf.describe(tx, params, compile=compiles)
    alone = rf.describe(published(layout=layout_of(block_size=4), momentum=0.9), params)
    assert description.mesh_axes == ("data",)
    assert "over the mesh axes data" in str(description)
    if kind is AxisType.Explicit:
        # Two devices hold a block of 4×4, or of 3×4, and eight that of 16: they exchange it twice, with padding.
        assert description.received_bytes == 4 * 2 * (2 * 4 * 2 * 2 + 3 * 2 * 2 + 2 * 8)
        assert "Traffic: an update's exchange is 480B" in str(description)
    else:
        assert description.rows == alone.rows
        # Four blocks of 3×4 become eight, as does one of 16; there are eight blocks of 4×4.
        padding = 4 * (4 * (9 + 16 + 12) + 16) + 7 * (4 * (16 + 16) + 16)
        assert description.state_bytes == alone.state_bytes + padding
        assert description.received_bytes is None
        assert "Layout(specs=...)" in str(description)
    assert not compiles or description.compiled.flops > 0


@dataclasses.dataclass(frozen=True)
class KeepsNothing(rf.BlockRule):
    def init(self, structures: Any, dtypes: Any) -> None:
        return None

    def precondition(self, state: Any, momentum: Any, **others: Any) -> Any:
        return momentum, state


def test_a_rule_of_ones_own_is_described_as_far_as_it_tells() -> None:
    description = rf.describe(rf.scale_by_kronecker(KeepsNothing(), layout=layout_of()), ONE)
    assert description.flops is None
    assert [(row.dtype, row.state_bytes) for row in description.rows] == [("", 12)] * 3
    assert "Step: unknown FLOPs of products" in str(description)
    assert "Refresh: unknown FLOPs, at every step." in str(description)
    both = optax.chain(published(), rf.scale_by_kronecker(KeepsNothing(), layout=layout_of()))
    assert rf.describe(both, ONE).flops is None


def compiled_flops(function: Any, *arguments: Any) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.contract
@pytest.mark.parametrize("structure", ["dense", "block64diagonal"])
@pytest.mark.parametrize(
    "rule",
    [
        RootFree(),
        PublishedRefresh(riemannian_momentum=0.5),
        PublishedRefresh(cache_preconditioner=True),
    ],
    ids=["root-free", "published", "published cached"],
)
def test_flops_are_those_of_the_compiled_program(rule: Any, structure: str) -> None:
    layout = layout_of(structure)
    [stack] = layout.plan({"w": struct(256, 192)}).stacks
    step = rf.Step(jnp.int32(0), jnp.float32(0.1), jnp.float32(0.1))
    state = jax.eval_shape(lambda: rule.init(stack.structures, (jnp.float32, jnp.float32)))
    gradient = struct(256, 192)
    given = {"structures": stack.structures, "step": step}
    told = rule.flops(stack.structures)
    refresh = compiled_flops(lambda state, g: rule.refresh(state, g, **given), state, gradient)
    direction = compiled_flops(lambda state, g: rule.precondition(state, g, gradient=g, **given), state, gradient)
    # What the compiler counts beside products is passes over the factors: of products of 64 columns 14 % in a refresh.
    np.testing.assert_allclose([refresh, direction], [told.refresh, told.precondition], rtol=0.15)
    if told.observe:
        observe = compiled_flops(lambda state, g: rule.observe(state, g, **given), state, gradient)
        np.testing.assert_allclose(observe, told.observe, rtol=0.12)
    assert (told.observe > 0) == isinstance(rule, RootFree)


def test_flops_of_the_cholesky_inverse_are_those_of_its_equations() -> None:
    a, b = 30, 20
    [stack] = layout_of().plan({"w": struct(a, b)}).stacks
    told = CholeskyInverse().flops(stack.structures)
    choleskys = (a**3 + b**3) // 3
    # L⁻¹G and L⁻ᵀ of that, for both axes; for curvatures one solve with the other factor, X Xᵀ, and L⁻¹ for the trace.
    assert told == (
        0,
        2 * choleskys + a * b * (a + b) + 2 * a * b * (a + b) + a**3 + b**3,
        choleskys + 2 * a * b * (a + b),
    )
    [vector] = layout_of().plan({"w": struct(a)}).stacks
    assert CholeskyInverse().flops(vector.structures) == (0, 2 * a + 2 * (a // 3), 2 * a + a // 3)


def test_flops_count_every_block() -> None:
    rule = RootFree()
    layout = layout_of(block_size=8)
    tx = rf.scale_by_kronecker(rule, layout=layout, refresh_every=rf.staggered(5), statistics_every=2)
    description = rf.describe(tx, {"a": struct(16, 8), "b": struct(8, 8)})
    [stack] = layout.plan({"a": struct(16, 8), "b": struct(8, 8)}).stacks
    assert description.blocks == stack.count == 3
    assert description.flops == tuple(3 * number for number in rule.flops(stack.structures))
    assert (description.refresh_every, description.statistics_every) == (("spread over 5 steps",), ("every 2 steps",))


@pytest.mark.parametrize(
    ("interval", "words"),
    [(1, "at every step"), (10, "every 10 steps"), (rf.growing(10), "at steps that the program decides")],
)
def test_intervals_are_told_in_words(interval: Any, words: str) -> None:
    description = rf.describe(optax.chain(published(refresh_every=interval), published(refresh_every=interval)), ONE)
    assert description.refresh_every == (words,)


def test_what_the_compiler_says_is_added() -> None:
    tx, params = published(momentum=0.9), {"w": struct(30, 20)}
    description = rf.describe(tx, params, compile=True)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(lambda g, s, p: tx.update(g, s, p, batch_size=1.0)).lower(params, state, params).compile()
    assert description.compiled.temporary_bytes == compiled.memory_analysis().temp_size_in_bytes > 0
    assert description.compiled.flops == int(compiled.cost_analysis()["flops"]) > 0
    assert f"{description.compiled.temporary_bytes / 1000:.3g}kB of temporaries" in str(description)
    assert rf.describe(tx, ONE).compiled is None
    assert rf.describe(optax.sgd(0.1), ONE, compile=True).compiled.flops > 0  # its update takes no batch size


def test_an_init_that_was_compiled_before_is_refused() -> None:
    tx = published()
    compiled = optax.GradientTransformation(jax.jit(tx.init), tx.update)
    assert rf.describe(tx, ONE).blocks == rf.describe(tx, ONE).blocks == 3  # nothing is remembered
    assert rf.describe(compiled, ONE).blocks == 3
    with pytest.raises(ValueError, match=r"of 1 only 0 did. Describe it before its init is wrapped in jax.jit"):
        rf.describe(compiled, ONE)


def test_nobody_listens_outside_of_describe() -> None:
    with pytest.raises(TypeError, match="must be real floating point"):
        rf.describe(published(), {"w": struct(2, 2, dtype="int32")})
    published().init({"w": jnp.zeros((2, 2))})
    with reports.collect_reports() as outer:
        assert rf.describe(published(), ONE).blocks == 3
    assert outer == []


class Cells(html.parser.HTMLParser):
    """Collects the text of every cell, by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


def test_notebooks_show_a_table() -> None:
    description = rf.describe(published(), {"<b>&": struct(4, 3), "c": struct(3)})
    cells = Cells()
    source = description._repr_html_()
    table, notes = source.split("</table>")
    cells.feed(table)
    assert [row[0] for row in cells.rows] == ["parameter", "<b>&", "c", "total"]
    assert {len(row) for row in cells.rows} == {6}
    assert "Step: " in notes
    assert repr(description) == str(description)


def test_of_nothing() -> None:
    description = rf.describe(published(), {})
    assert (description.rows, description.blocks, description.flops, description.adam_ratio) == ((), 0, (0, 0, 0), 16)
    assert str(description).splitlines()[-2].split() == ["total", "0", "0", "16B"]

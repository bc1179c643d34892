"""A plan partitions a tree into stacks of blocks, gives the tree back, and depends on paths and shapes alone."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.layout import Layout, Plan, as_matrix, flatten, weight_and_bias
from rootfree_optax._src.structures.names import dense, diagonal

SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)
SIZES = st.none() | st.integers(1, 7)


def struct(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def numbered(structs: object) -> object:
    """Returns arrays of the given shapes in which every number of the tree occurs once."""
    count = itertools.count(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.reshape([next(count) for _ in range(leaf.size)], leaf.shape), leaf.dtype), structs
    )


@functools.partial(jax.jit, static_argnums=0)
def there_and_back(plan: Plan, tree: object) -> tuple:
    packed = plan.pack(tree)
    return packed, plan.unpack(packed, tree)


@hypothesis.given(st.lists(SHAPES, min_size=1, max_size=4), SIZES, SIZES, st.sampled_from([None, "dense", "diagonal"]))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=20)
def test_every_entry_is_in_one_block_and_comes_back(shapes: list, block: int, merge: int, structure: str) -> None:
    layout = whole(structure, block_size=block, merge_dims=merge)
    tree = numbered([struct(*shape) for shape in shapes])
    plan = layout.plan(tree)
    packed, back = there_and_back(plan, tree)
    assert [array.shape for array in packed] == [(stack.count, *stack.shape) for stack in plan.stacks]
    entries = np.sort(np.concatenate([np.ravel(array) for array in packed]))
    np.testing.assert_array_equal(entries, np.arange(1, entries.size + 1))
    assert sum(map(math.prod, shapes)) == entries.size
    jax.tree.map(np.testing.assert_array_equal, tree, back)
    assert all(
        s.dim == length for stack in plan.stacks for s, length in zip(stack.structures, stack.shape, strict=True)
    )


@hypothesis.given(st.integers(0, 2), SIZES, st.booleans(), st.sampled_from([(), (1,), (3,), (2, 2)]))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=12)
def test_groups_and_layers_come_back(rank: int, block: int, merge: bool, layers: tuple) -> None:
    groups = (weight_and_bias(), flatten("embedding"), as_matrix("query", 1))
    axes = {"^layers": tuple(range(len(layers)))}
    layout = whole(group=groups, block_size=block, merge_dims=4 if merge else None, layer_axes=axes)
    layer = {"kernel": (5, 3), "bias": (3,), "query": (2, 3, 2), "scale": (1, 4)[:rank]}
    tree = numbered(
        {"layers": {name: struct(*layers, *shape) for name, shape in layer.items()}, "embedding": struct(3, 2)}
    )
    plan = layout.plan(tree)
    packed, back = there_and_back(plan, tree)
    entries = np.sort(np.concatenate([np.ravel(array) for array in packed]))
    np.testing.assert_array_equal(entries, np.arange(1, entries.size + 1))
    jax.tree.map(np.testing.assert_array_equal, tree, back)


def test_a_block_is_where_its_name_says() -> None:
    tree = numbered({"a": {"kernel": struct(8, 1, 5)}, "b": struct(3, 2, 5, 6), "c": struct(2, 5), "d": struct()})
    plan = whole(block_size=3, layer_axes={"b": (0, 1), "c": 0}).plan(tree)
    packed = plan.pack(tree)
    blocks = {block.name: packed[block.stack][block.position] for block in plan.blocks}
    assert len(blocks) == len(plan.blocks) == sum(stack.count for stack in plan.stacks)
    kernel, layers = np.squeeze(tree["a"]["kernel"]), np.asarray(tree["b"])
    for i, j in itertools.product(range(3), range(2)):
        np.testing.assert_array_equal(blocks.pop(f"a/kernel[{i}, {j}]"), kernel[3 * i : 3 * i + 3, 3 * j : 3 * j + 3])
    for k, m, i, j in itertools.product(range(3), range(2), range(2), range(2)):
        expected = layers[k, m, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
        np.testing.assert_array_equal(blocks.pop(f"b[{k}, {m}; {i}, {j}]"), expected)
    np.testing.assert_array_equal(blocks.pop("c[1]"), tree["c"][1])
    np.testing.assert_array_equal(blocks.pop("c[0]"), tree["c"][0])
    np.testing.assert_array_equal(blocks.pop("d"), np.reshape(tree["d"], 1))
    assert not blocks


def test_layers_along_any_axis_are_separate_layers_exactly() -> None:
    rng = np.random.default_rng(0)
    layers = [jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(3)]
    stacked = jnp.stack(layers, axis=1)
    step = lambda layout, tree: jax.jit(lambda tree: one_step(layout, tree))(tree)
    together = step(whole(layer_axes={"w": 1}, block_size=3), {"w": stacked, "b": jnp.ones(2)})
    apart = step(whole(block_size=3), {"b": jnp.ones(2), **{f"w{i}": layer for i, layer in enumerate(layers)}})
    for i in range(3):
        np.testing.assert_array_equal(together["w"][:, i], apart[f"w{i}"])
    np.testing.assert_array_equal(together["b"], apart["b"])
    np.testing.assert_array_equal(step(whole(layer_axes={"w": -2}, block_size=3), {"w": stacked})["w"], together["w"])


def one_step(layout: Layout, tree: object) -> object:
    transformation = rf.published.scale_by_sirf_shampoo(batch_size=1, layout=layout)
    updates, _ = transformation.update(tree, transformation.init(tree), tree)
    return updates


def test_two_layer_axes_that_do_not_lead() -> None:
    tree = numbered({"experts": struct(2, 5, 3, 4)})
    experts = np.asarray(tree["experts"])
    plan = whole(layer_axes=(0, 2), block_size=4).plan(tree)
    packed = plan.pack(tree)
    assert [(stack.shape, stack.count) for stack in plan.stacks] == [((3, 4), 6), ((2, 4), 6)]
    blocks = {block.name: packed[block.stack][block.position] for block in plan.blocks}
    for layer, expert in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(blocks[f"experts[{layer}, {expert}; 0, 0]"], experts[layer, :3, expert])
        np.testing.assert_array_equal(blocks[f"experts[{layer}, {expert}; 1, 0]"], experts[layer, 3:, expert])
    jax.tree.map(np.testing.assert_array_equal, plan.unpack(packed, tree), tree)


def test_long_axes_are_cut_unless_diagonal() -> None:
    structure = lambda path, shape: ("diagonal", "dense") if path == "a" else None
    plan = whole(structure, block_size=4).plan({"a": struct(9, 8), "b": struct(9)})
    kinds = [(stack.shape, stack.structures, stack.count) for stack in plan.stacks]
    assert kinds == [((9, 4), (diagonal(9), dense(4)), 2), ((9,), (diagonal(9),), 1)]


@pytest.mark.parametrize(
    ("length", "lengths"),
    [
        (256, [256]),
        (257, [144, 113]),
        (512, [256, 256]),
        (600, [208, 208, 184]),
        (1000, [256, 256, 256, 232]),
        (1025, [208, 208, 208, 208, 193]),
        (1280, [256] * 5),
        (1300, [224, 224, 224, 224, 224, 180]),
        (4000, [256] * 15 + [160]),
    ],
)
def test_an_axis_is_cut_into_blocks_of_nearly_one_length(length: int, lengths: list[int]) -> None:
    tree = {"w": struct(length, 1)}
    plan = whole("dense", block_size=256).plan(tree)
    found = {block.index[0]: plan.stacks[block.stack].shape[0] for block in plan.blocks}
    assert [found[i] for i in range(len(found))] == lengths


@hypothesis.given(st.integers(1, 500), st.integers(1, 60))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=100)
def test_blocks_are_as_few_and_as_equal_as_the_block_size_allows(length: int, block_size: int) -> None:
    (unit,) = whole("dense", block_size=block_size).plan({"w": struct(length)}).units
    (cut,) = unit.cuts
    lengths = [run.length for run in cut.runs for _ in range(run.count)]
    assert sum(lengths) == length
    assert max(lengths) <= block_size
    assert len(lengths) == -(-length // block_size)
    equal = -(-length // len(lengths))
    assert set(lengths[:-1]) <= {equal, -(-equal // 16) * 16}
    assert lengths[-1] >= min(lengths[0] / 2, length - equal * (len(lengths) - 1))


def test_one_stack_for_all_blocks_of_a_kind() -> None:
    tree = {f"layer_{i}": {"in": struct(4, 8), "out": struct(8, 4), "bias": struct(8)} for i in range(5)}
    plan = whole(block_size=4).plan(tree)
    assert [(stack.shape, stack.count) for stack in plan.stacks] == [((8,), 5), ((4, 4), 20)]
    positions = [(block.stack, block.position) for block in plan.blocks]
    assert sorted(positions) == [(0, i) for i in range(5)] + [(1, i) for i in range(20)]


def test_the_plan_depends_on_paths_and_shapes_alone_and_is_made_once() -> None:
    layout = whole(block_size=4)
    tree = {"a": struct(9, 8), "b": [struct(3), None]}
    plan = layout.plan(tree)
    assert layout.plan({"a": jnp.ones((9, 8), jnp.bfloat16), "b": [jnp.ones(3), optax.MaskedNode()]}) is plan
    traced = []
    jax.eval_shape(lambda tree: traced.append(layout.plan(tree)), tree)
    assert traced[0] is plan
    assert whole(block_size=4).plan(tree) is plan
    assert layout.plan({"a": struct(9, 8), "c": [struct(3)]}) != plan
    assert {plan: 1}[layout.plan(tree)] == 1
    assert jax.tree.leaves(plan) == [plan]


def test_a_plan_of_nothing() -> None:
    plan = whole().plan({"a": None, "b": optax.MaskedNode()})
    assert (plan.stacks, plan.blocks, plan.pack({"a": None, "b": optax.MaskedNode()})) == ((), (), ())
    assert plan.unpack((), {"a": None, "b": optax.MaskedNode()}) == {"a": None, "b": optax.MaskedNode()}


def test_stacks_are_as_wide_as_their_widest_member_and_leaves_get_their_dtype_back() -> None:
    tree = {
        "a": jnp.ones((2, 2), jnp.bfloat16),
        "b": jnp.ones((2, 2), jnp.float16),
        "c": jnp.ones(3, jnp.bfloat16),
        "dense": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3)},
    }
    plan = whole(group=(weight_and_bias(),)).plan(tree)
    packed = plan.pack(tree)
    assert [array.dtype for array in packed] == [jnp.float32, jnp.bfloat16, jnp.float32]
    back = plan.unpack([array.astype(jnp.float32) for array in packed], tree)
    assert [leaf.dtype for leaf in jax.tree.leaves(back)] == [leaf.dtype for leaf in jax.tree.leaves(tree)]
    # What is left of a cut shares its stack with another parameter, which makes it wider than the other blocks.
    mixed = numbered({"a": struct(5, 3, dtype="bfloat16"), "b": struct(2, 3)})
    plan = whole(block_size=3).plan(mixed)
    assert [array.dtype for array in plan.pack(mixed)] == [jnp.bfloat16, jnp.float32]
    jax.tree.map(np.testing.assert_array_equal, plan.unpack(plan.pack(mixed), mixed), mixed)


def test_a_parameter_without_a_gradient_is_minus_infinity_and_stays_none() -> None:
    params = {"a": struct(2, 2), "b": struct(2, 2), "dense": {"kernel": struct(3, 2), "bias": struct(2)}}
    plan = whole(group=(weight_and_bias(),)).plan(params)
    gradients = {"a": None, "b": jnp.ones((2, 2)), "dense": {"kernel": None, "bias": None}}
    squares, joined = plan.pack(gradients)
    np.testing.assert_array_equal(np.isneginf(squares).all((1, 2)), [True, False])
    assert np.isneginf(joined).all()
    back = plan.unpack((squares, joined), gradients)
    assert back["a"] is back["dense"]["kernel"] is back["dense"]["bias"] is None
    np.testing.assert_array_equal(back["b"], np.ones((2, 2)))
    gradients["dense"]["bias"] = jnp.ones(2)
    with pytest.raises(ValueError, match=r"gradients must .* group 'dense/kernel\+bias' .* None at 'dense/kernel'"):
        plan.pack(gradients)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"x": jnp.ones(2)}}, "curvature must be a tree like the parameters.*'b' is missing"),
        ({"a": {"x": jnp.ones(2)}, "b": jnp.ones(3), "c": jnp.ones(1)}, "'c' is no parameter"),
        ({"a": {"x": jnp.ones(4)}, "b": jnp.ones(3)}, r"got \(4,\) at 'a/x' instead of \(2,\)"),
    ],
)
def test_trees_unlike_the_parameters_are_an_error(tree: object, message: str) -> None:
    plan = whole().plan({"a": {"x": struct(2)}, "b": struct(3), "c": None})
    with pytest.raises(ValueError, match=message):
        plan.pack(tree, name="curvature")
    with pytest.raises(ValueError, match=message.removeprefix("curvature")):
        plan.unpack((jnp.ones((1, 2)), jnp.ones((1, 3))), tree)


def test_stacks_unlike_the_plan_are_an_error() -> None:
    plan = whole().plan(struct(2))
    with pytest.raises(ValueError, match=r"the shapes \[\(1, 2\)\], got \[\(2, 2\)\]"):
        plan.unpack((jnp.ones((2, 2)),), jnp.ones(2))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            {"a": {"x": struct(2, dtype="int32")}},
            TypeError,
            "real floating point of at least 16 bits, got int32 at 'a/x'",
        ),
        (
            {"a": struct(2, dtype="complex64")},
            TypeError,
            "real floating point of at least 16 bits, got complex64 at 'a'",
        ),
        ({"a/b": struct(2), "a": {"b": struct(2)}}, ValueError, "distinct key paths, but two of them have 'a/b'"),
    ],
)
def test_parameters_that_cannot_be_planned(params: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        whole().plan(params)


REST = {
    "embed": struct(12, 4),
    "layers": {"kernel": struct(3, 4, 5), "bias": struct(3, 5), "scale": struct(3, 1, 4)},
    "lm_head": {"kernel": struct(4, 6), "bias": struct(6)},
    "dense": {"kernel": struct(4, 4), "bias": struct(4)},
    "temperature": struct(),
    "long_row": struct(1, 32_769),
    "wide": struct(2, 32_769),
    "as_wide_as_may_be": struct(2, 32_768),
}


def rest_of(diagonal: object, **arguments: object) -> dict[str, str]:
    """Returns the reasons of the parameters without factors, after checking that all others are in a unit."""
    plan = whole(layer_axes={"^layers": 0}, diagonal=diagonal, **arguments).plan(REST)
    shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(REST)}
    assert {rest.path: rest.shape for rest in plan.rest} == {rest.path: shapes[rest.path] for rest in plan.rest}
    planned = [path for unit in plan.units for path in unit.paths]
    assert sorted([*planned, *(rest.path for rest in plan.rest)]) == sorted(shapes)
    return {rest.path: rest.reason for rest in plan.rest}


def test_by_default_every_parameter_has_factors() -> None:
    assert rest_of(None) == {}


def test_embeddings_vectors_and_very_long_axes_have_no_factors() -> None:
    vectors = dict.fromkeys(
        ("layers/bias", "layers/scale", "lm_head/bias", "dense/bias", "temperature", "long_row"), "a vector or scalar"
    )
    always = vectors | {"wide": "an axis longer than 32,768"}
    by_name = {path: f"{word!r} in its key path" for path, word in [("embed", "embed"), ("lm_head/kernel", "head")]}
    by_name["lm_head/bias"] = by_name["lm_head/kernel"]
    assert rest_of(rf.EMBEDDINGS) == always | by_name
    assert rest_of("^dense/k") == always | {"dense/kernel": "'dense/k' in its key path"}
    chosen = lambda path, shape: path == "dense/kernel" and shape == (4, 4)
    assert rest_of(chosen) == always | {"dense/kernel": "chosen by the callable"}
    # A rule that applies to a vector gives it factors, but none that `diagonal` has excluded by name.
    grouped = rest_of(rf.EMBEDDINGS, group=(weight_and_bias(), flatten("temperature")))
    assert grouped == {
        path: reason
        for path, reason in (always | by_name).items()
        if path not in ("layers/bias", "dense/bias", "temperature")
    }


def test_parameters_without_factors_are_in_no_stack_and_come_back_as_they_are_given() -> None:
    tree = numbered({"embed": struct(6, 4, dtype="bfloat16"), "kernel": struct(4, 5), "bias": struct(5)})
    plan = whole(diagonal=rf.EMBEDDINGS).plan(tree)
    assert [(stack.shape, stack.count) for stack in plan.stacks] == [((4, 5), 1)]
    packed = plan.pack(tree)
    rest = {"embed": jnp.ones((6, 4)), "bias": jnp.zeros(5)}
    back = plan.unpack(packed, tree, rest=rest)
    np.testing.assert_array_equal(back["kernel"], tree["kernel"])
    np.testing.assert_array_equal(back["embed"], rest["embed"])
    np.testing.assert_array_equal(back["bias"], rest["bias"])
    assert back["embed"].dtype == jnp.bfloat16
    without = plan.unpack(packed, {**tree, "embed": None}, rest={"bias": rest["bias"]})
    assert without["embed"] is None
    np.testing.assert_array_equal(without["bias"], rest["bias"])


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({}, "rest, of the parameters without factors, must .* but 'bias' is missing"),
        ({"bias": (5,)}, "but 'embed' is missing"),
        ({"bias": (5,), "embed": (4, 6)}, r"rest, .* must .* got \(4, 6\) at 'embed' instead of \(6, 4\)"),
        ({"bias": (5,), "embed": (6, 4), "kernel": (4, 5)}, "without factors, must .* but 'kernel' is no parameter"),
    ],
    ids=["none", "missing", "shape", "more"],
)
def test_unpack_needs_the_rest(rest: dict, message: str) -> None:
    tree = {"embed": jnp.ones((6, 4)), "kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
    plan = whole(diagonal=rf.EMBEDDINGS).plan(tree)
    with pytest.raises(ValueError, match=message):
        plan.unpack(plan.pack(tree), tree, rest={path: jnp.zeros(shape) for path, shape in rest.items()} or None)


def test_a_diagonal_pattern_without_a_match_is_an_error() -> None:
    tree = {"kernel": struct(4, 4)}
    assert whole(diagonal=rf.EMBEDDINGS).plan(tree).rest == ()
    with pytest.raises(ValueError, match=r"diagonal must match .* got 'embedding'. The nearest key paths are 'kernel'"):
        whole(diagonal="embedding").plan(tree)


def transformer(layers: int, width: int = 256) -> dict:
    block = {
        "attention": {"qkv": struct(width, 3 * width), "proj": struct(width, width)},
        "mlp": {
            "fc": {"kernel": struct(width, 4 * width), "bias": struct(4 * width)},
            "out": {"kernel": struct(4 * width, width), "bias": struct(width)},
        },
        "ln1": {"scale": struct(width), "bias": struct(width)},
        "ln2": {"scale": struct(width), "bias": struct(width)},
    }
    ends = {"embedding": struct(2048, width), "positions": struct(256, width), "ln": struct(width)}
    return {f"layer_{i}": block for i in range(layers)} | ends


def lines(function: object, *arguments: object) -> int:
    return jax.jit(function).lower(*arguments).as_text().count("\n")


def test_packing_and_unpacking_cost_few_operations_per_parameter() -> None:
    params = transformer(24)
    plan = whole(block_size=256).plan(params)
    assert len(plan.stacks) == 3
    # A reshape or a slice each way for most, a transposition more where columns are cut: fewer than four, where slicing
    # the 442 blocks apart would by itself take as many.
    found = lines(lambda tree: plan.unpack(plan.pack(tree), tree), params)
    assert found < 4 * len(jax.tree.leaves(params))


def test_with_equal_kernels_the_program_does_not_hold_where_blocks_begin() -> None:
    """A slice with a start of its own would be a kernel of its own for each parameter, see `opaque`."""
    tree = {name: jnp.ones((3, 2)) for name in "abc"}
    plan = whole().plan(tree)

    def starts_unseen(equal_kernels: bool) -> int:
        back = lambda tree: plan.unpack(plan.pack(tree), tree, equal_kernels=equal_kernels)
        return sum(e.primitive.name == "dynamic_slice" for e in jax.make_jaxpr(back)(tree).jaxpr.eqns)

    assert (starts_unseen(True), starts_unseen(False)) == (3, 0)


@pytest.mark.parametrize(
    ("layout", "shapes", "message"),
    [
        ({"structure": lambda *_: (lambda _: dense(4),) * 2}, {"w": (6, 4)}, r"of 6 rows for 'w', got dense\(4\)"),
        ({"structure": lambda *_: (lambda _: "dense",) * 2}, {"w": (6, 4)}, "of 6 rows for 'w', got 'dense'"),
        ({"block_size": 2}, {"w": (4, 2), "w[0, 0]": (2,)}, r"two are called 'w\[0, 0\]'"),
        ({"group": (weight_and_bias(),)}, {"kernel": (4, 2), "bias": (2,), "kernel+bias": (3,)}, "kernel.bias'"),
        (
            {"group": (rf.Group(("s", "b"), lambda s, _: s[:0], lambda t, *shapes: tuple(map(jnp.zeros, shapes))),)},
            {"s": (3,), "b": (3,)},
            r"join must return a tensor with entries, got \(0,\)",
        ),
    ],
    ids=["size", "name", "block", "group", "empty"],
)
def test_rules_that_do_not_fit_are_refused(layout: dict, shapes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(**layout).plan({name: struct(*shape) for name, shape in shapes.items()})

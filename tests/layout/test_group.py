"""Group rules find their members, join them layer by layer, and can be undone."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st
from layouts import whole

from rootfree_optax._src.layout import Group, as_matrix, flatten, weight_and_bias
from rootfree_optax._src.layout.group import assign, join_members, join_shapes, split_members


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def arrays_like(shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def names(params: object, *rules: Group, layer_axes: object = None) -> list[str]:
    return [unit.name for unit in whole(group=rules, layer_axes=layer_axes).plan(params).units]


LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
CASES = st.one_of(
    st.tuples(LENGTHS, LENGTHS).map(lambda ends: (weight_and_bias(), ((*ends[0], *ends[1]), ends[1]))),
    st.tuples(LENGTHS, LENGTHS).map(
        lambda ends: (weight_and_bias(output_axis=0), ((*ends[1], *ends[0]), ends[1])),
    ),
    LENGTHS.map(lambda shape: (flatten("."), (shape,))),
    st.tuples(LENGTHS, LENGTHS).map(lambda ends: (as_matrix(".", len(ends[0])), ((*ends[0], *ends[1]),))),
)


@hypothesis.given(CASES, st.lists(st.integers(1, 3), max_size=2).map(tuple))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=15)
def test_split_undoes_join_in_every_layer(case: tuple, layers: tuple[int, ...]) -> None:
    rule, shapes = case
    assert rule.condition is None or rule.condition(*shapes)
    arrays = arrays_like(tuple((*layers, *shape) for shape in shapes))
    tensor = join_members(arrays, rule, len(layers))
    joined = join_shapes(rule, {str(i): shape for i, shape in enumerate(shapes)})
    assert tensor.shape == (*layers, *joined)
    assert math.prod(joined) == sum(map(math.prod, shapes))
    for array, back in zip(arrays, split_members(tensor, rule, shapes, len(layers)), strict=True):
        np.testing.assert_array_equal(array, back)


def test_the_bias_is_the_last_row() -> None:
    kernel, bias = arrays_like(((3, 2, 4), (4,)))
    tensor = join_members([kernel, bias], weight_and_bias(), 0)
    np.testing.assert_array_equal(tensor, np.concatenate([np.reshape(kernel, (6, 4)), np.reshape(bias, (1, 4))]))


def test_the_bias_is_the_last_column_of_a_weight_with_its_output_first() -> None:
    weight, bias = arrays_like(((4, 3, 2), (4, 1, 1)))
    tensor = join_members([weight, bias], weight_and_bias(output_axis=0), 0)
    np.testing.assert_array_equal(tensor, np.concatenate([np.reshape(weight, (4, 6)), np.reshape(bias, (4, 1))], 1))


@pytest.mark.parametrize("output_axis", [-1, 0])
def test_of_a_square_weight_the_output_is_what_the_user_says(output_axis: int) -> None:
    tree = {"kernel": jnp.zeros((3, 3)), "bias": jnp.ones(3)}
    (matrix,) = whole(group=(weight_and_bias(output_axis=output_axis),)).plan(tree).pack(tree)
    expected = np.zeros((4, 3))
    expected[3] = 1
    np.testing.assert_array_equal(matrix[0], expected if output_axis == -1 else expected.T)


@pytest.mark.parametrize(
    ("output_axis", "weight", "bias", "message"),
    [
        (
            -1,
            (4, 3),
            (4,),
            r"output_axis=-1 of .* \(4, 3\) and .* \(4,\), which fit output_axis=0 only.*'d/kernel', 'd/bias'",
        ),
        (0, (3, 4), (4,), r"output_axis=0 of .* \(3, 4\) .* which fit output_axis=-1 only"),
        (0, (5, 3, 4), (5, 4), "fit neither 0 nor -1. Set layer_axes if an axis indexes layers"),
        (-1, (3, 4), (5,), "fit neither"),
        (-1, (3, 4), (), "fit neither"),
    ],
)
def test_a_bias_that_does_not_fit_its_weight_is_an_error(
    output_axis: int, weight: tuple, bias: tuple, message: str
) -> None:
    params = {"d": {"kernel": struct(*weight), "bias": struct(*bias)}}
    with pytest.raises(ValueError, match=message):
        names(params, weight_and_bias(output_axis=output_axis))


def test_the_output_of_a_square_weight_is_told_by_its_name() -> None:
    tree = {"weight": jnp.arange(9.0).reshape(3, 3), "bias": -jnp.ones(3)}
    (matrix,) = whole(group=(weight_and_bias("weight"),)).plan(tree).pack(tree)
    np.testing.assert_array_equal(matrix[0], np.concatenate([tree["weight"], -np.ones((3, 1))], axis=1))


@pytest.mark.parametrize("output_axis", [-1, 0])
def test_normalization_layers_stay_apart(output_axis: int) -> None:
    params = {"a": {"scale": struct(4), "bias": struct(4)}, "b": {"scale": struct(4, 5), "bias": struct(4, 5)}}
    found = names(params, weight_and_bias("scale", output_axis=output_axis))
    assert found == ["a/bias", "a/scale", "b/bias", "b/scale"]


def test_rows_of_a_matrix() -> None:
    (kernel,) = arrays_like(((5, 2, 3),))
    np.testing.assert_array_equal(join_members([kernel], as_matrix("query", 1), 0), np.reshape(kernel, (5, 6)))
    np.testing.assert_array_equal(join_members([kernel], as_matrix("out", 2), 0), np.reshape(kernel, (10, 3)))


def test_members_share_a_parent_and_each_is_taken_once() -> None:
    params = {
        "dense": {"kernel": struct(3, 4), "bias": struct(4), "scale": struct(4)},
        "no_bias": {"kernel": struct(3, 4)},
        "norm": {"scale": struct(4), "bias": struct(4)},
        "kernel": struct(2, 2),
        "bias": struct(2),
        "my_kernel": struct(2, 2),
        "my_bias": struct(2),
    }
    found = names(params, weight_and_bias(), weight_and_bias("scale", "bias", output_axis=-1), as_matrix("dense", 1))
    assert found == [
        "kernel+bias",
        "dense/kernel+bias",
        "dense/scale",
        "my_bias",
        "my_kernel",
        "no_bias/kernel",
        "norm/bias",
        "norm/scale",
    ]


def test_the_first_rule_that_applies_wins_and_patterns_select() -> None:
    params = {"a": {"kernel": struct(3, 4), "bias": struct(4)}, "b": {"kernel": struct(3, 4), "bias": struct(4)}}
    plan = whole(group=(flatten("a/kernel"), weight_and_bias(pattern="^[ab]/"))).plan(params)
    assert [(unit.name, unit.lengths) for unit in plan.units] == [
        ("a/bias", (4,)),
        ("a/kernel", (12,)),
        ("b/kernel+bias", (4, 4)),
    ]


def test_variables_of_nnx_are_named_without_their_box() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plan = whole(group=(weight_and_bias(),)).plan(nnx.state(model, nnx.Param))
    assert [(unit.name, (*unit.layer_shape, *unit.tensor_shape)) for unit in plan.units] == [("kernel+bias", (3, 3))]


def test_a_box_may_hold_one_member_of_a_group_and_not_the_other() -> None:
    dense = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("data", None)))
    variables = jax.eval_shape(dense.init, jax.random.key(0), jnp.ones((1, 2)))
    (unit,) = whole(group=(weight_and_bias(),)).plan(variables).units
    assert (unit.name, unit.paths) == ("params/kernel+bias", ("params/kernel/value", "params/bias"))


def test_a_group_that_finds_no_members_is_an_error() -> None:
    haiku = {"linear": {"w": struct(3, 4), "b": struct(4)}}
    with pytest.raises(
        ValueError, match=r"named 'kernel' and 'bias' .* last keys .* 'b', 'w'.*weight_and_bias\('w', 'b'\)"
    ):
        names(haiku, weight_and_bias())
    assert names(haiku, weight_and_bias("w", "b")) == ["linear/w+b"]
    with pytest.raises(ValueError, match=r"under a common parent, but the last keys of the parameters are 'kernel'\.$"):
        names({"kernel": struct(3, 4)}, weight_and_bias())
    flax = {"a": {"kernel": struct(3, 4)}, "b": {"kernel": struct(3, 4), "bias": struct(4)}}
    with pytest.raises(ValueError, match="common parent where the first matches '\\^a'"):
        names(flax, weight_and_bias(pattern="^a"))
    with pytest.raises(ValueError, match=r"the pattern of a group must match .* got 'embed'\. The nearest key paths"):
        names(flax, flatten("embed"))
    assert names({}, flatten("embed"), weight_and_bias()) == []


def test_members_of_a_group_may_lie_deeper() -> None:
    rule = Group(("in/kernel", "out/kernel"), lambda a, b: jnp.stack([a, b]), lambda t, *_: (t[0], t[1]))
    mlp = {"in": {"kernel": struct(3, 3)}, "out": {"kernel": struct(3, 3)}}
    assert names({"params": {"mlp": mlp, "kernel": struct(2, 2)}}, rule) == [
        "params/kernel",
        "params/mlp/in/kernel+out/kernel",
    ]


def test_layers_are_joined_one_by_one() -> None:
    params = {"layers": {"kernel": struct(5, 3, 4), "bias": struct(5, 4)}, "head": {"kernel": struct(4, 2)}}
    plan = whole(group=(weight_and_bias(),), layer_axes={"^layers/": 0}).plan(params)
    assert [(unit.name, (*unit.layer_shape, *unit.tensor_shape)) for unit in plan.units] == [
        ("head/kernel", (4, 2)),
        ("layers/kernel+bias", (5, 4, 4)),
    ]
    kernel, bias = arrays_like(((5, 3, 4), (5, 4)))
    packed = plan.pack({"layers": {"kernel": kernel, "bias": bias}, "head": {"kernel": jnp.ones((4, 2))}})
    np.testing.assert_array_equal(packed[1], np.concatenate([kernel, np.expand_dims(bias, 1)], axis=1))


def test_members_may_have_their_layer_axes_at_different_positions() -> None:
    kernel, bias = arrays_like(((3, 5, 4), (5, 4)))
    tree = {"kernel": kernel, "bias": bias}
    plan = whole(group=(weight_and_bias(),), layer_axes={"kernel": 1, "bias": 0}).plan(tree)
    (packed,) = plan.pack(tree)
    layers = [np.concatenate([kernel[:, i], bias[None, i]]) for i in range(5)]
    np.testing.assert_array_equal(packed, layers)
    jax.tree.map(np.testing.assert_array_equal, plan.unpack((packed,), tree), tree)


def test_members_with_different_layer_axes_are_an_error() -> None:
    params = {"kernel": struct(5, 3, 4), "bias": struct(4)}
    with pytest.raises(ValueError, match=r"same layer axes.*'kernel': \(5,\), 'bias': \(\)} for .*\(5, 3, 4\)"):
        names(params, Group(("kernel", "bias"), jnp.add, lambda x, *_: (x, x)), layer_axes={"kernel": 0})


def test_a_rule_that_cannot_be_undone_is_an_error() -> None:
    rule = Group(("a", "b"), lambda a, b: jnp.concatenate([a, b]), lambda x, *_: (x[:3], x[3:]))
    assert names({"a": struct(3), "b": struct(2)}, rule) == ["a+b"]
    with pytest.raises(
        ValueError, match=r"split must be the inverse of join, but join returns \(6,\) for {'p/a': \(2,\), 'p/b'"
    ):
        names({"p": {"a": struct(2), "b": struct(4)}}, rule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group("kernel", jnp.add, jnp.split), "tuple of names, got the string 'kernel'"),
        (lambda: Group(("a", "a"), jnp.add, jnp.split), r"must be distinct, got \('a', 'a'\)"),
        (lambda: flatten("("), r"pattern must be a regular expression, got '\('"),
        (lambda: weight_and_bias(output_axis=1), r"output_axis must be -1 \(the last axes\) or 0 .* got 1"),
        (lambda: weight_and_bias("scale"), r"output_axis must be -1 .* for weights called 'scale', got None"),
        (lambda: as_matrix("q", 0), "rows must be a whole number of at least 1, as a Python int, got 0"),
    ],
)
def test_bad_rules_are_refused_at_construction(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ready_made_rules_are_equal_when_their_arguments_are() -> None:
    assert as_matrix("q", 1) == as_matrix("q", 1) != as_matrix("q", 2)
    assert len({weight_and_bias(), weight_and_bias(), flatten("a"), flatten("a"), flatten("b")}) == 3


def test_assignments_partition_the_parameters() -> None:
    shapes = dict.fromkeys(("a/kernel", "b/kernel", "b/other", "c"), (2, 2))
    rules = (Group(("kernel", "other"), jnp.add, jnp.split), flatten("kernel|c"))
    found = assign(rules, shapes, {path: path for path in shapes})
    assert [assignment.paths for assignment in found] == [("a/kernel",), ("b/kernel", "b/other"), ("c",)]
    assert [assignment.rule for assignment in found] == [rules[1], rules[0], rules[1]]

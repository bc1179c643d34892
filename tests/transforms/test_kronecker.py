"""The two Kronecker transformations: blocks, layers and groups; when they refresh; schedules and momentum."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import in_contract
from kronecker_runs import (
    SETTING,
    assert_close,
    both_forms,
    compile_run,
    dense_factors,
    draw,
    factors_of,
    last,
    params_of,
    run,
    scale_by_published,
)
from layouts import whole

import rootfree_optax as rf
from rootfree_optax import weight_and_bias


@both_forms
def test_a_block_equals_a_parameter_of_its_own(make):
    gradients, layout = draw({"w": (2, 2, 5)}), whole(layer_axes=0, block_size=3)
    blocks = layout.plan(params_of(gradients)).blocks

    def block_of(array, block):
        window = tuple(slice(i * layout.block_size, (i + 1) * layout.block_size) for i in block.index)
        return array[(slice(None), *block.layer, *window)]

    # Named in the reverse order, so that they stand elsewhere in their stacks.
    names = {block.name: f"{len(blocks) - i}" for i, block in enumerate(blocks)}
    assert len(names) == 4
    cut = lambda tree: {names[block.name]: block_of(tree[block.parameter], block) for block in blocks}
    directions, states = run(make(layout=layout, **SETTING), gradients)
    separate = whole("dense")
    expected, expected_states = run(make(layout=separate, **SETTING), cut(gradients))
    assert_close(cut(directions), expected)
    expected_factors = dense_factors(last(expected_states), params_of(cut(gradients)), separate)
    factors = dense_factors(last(states), params_of(gradients), layout)
    assert_close({names[name]: matrices for name, matrices in factors.items()}, expected_factors)


@pytest.mark.contract
def test_joined_and_merged_parameters_equal_matrices_made_by_hand():
    gradients = draw({"d": {"kernel": (2, 2, 3), "bias": (3,)}, "m": (2, 1, 3, 4)})
    layer = gradients["d"]
    joined = np.concatenate([layer["kernel"].reshape(-1, 4, 3), layer["bias"][:, None]], axis=1)
    by_hand = {"d/kernel+bias": joined, "m": gradients["m"].reshape(-1, 6, 4)}
    layout = whole(group=(weight_and_bias(),), merge_dims=6)
    directions, states = run(scale_by_published(layout=layout, **SETTING), gradients)
    expected, expected_states = run(scale_by_published(**SETTING), by_hand)
    kernel, bias = np.split(expected["d/kernel+bias"], [4], axis=1)
    split = {"kernel": kernel.reshape(layer["kernel"].shape), "bias": bias[:, 0]}
    assert_close(directions, {"d": split, "m": expected["m"].reshape(gradients["m"].shape)})
    found = dense_factors(last(states), params_of(gradients), layout)
    assert_close(found, dense_factors(last(expected_states), params_of(by_hand)))


@both_forms
def test_curvature_with_samples_reaches_every_block(make):
    """It takes the gradient's place in H, as a mean over samples of their outer products."""
    layout = whole(block_size=3)
    rng = np.random.default_rng(0)
    gradient = {"w": np.float32(rng.standard_normal((5, 3)))}
    samples = {"w": np.float32(0.7 * rng.standard_normal((4, 5, 3)))}
    tx = make(0.5, 0.0, batch_size=2, layout=layout)
    _, state = jax.jit(lambda g, c: tx.update(g, tx.init(g), curvature=c))(gradient, samples)
    factors = rf.factors(state, gradient, layout)
    for name, window in (("w[0, 0]", samples["w"][:, :3]), ("w[1, 0]", samples["w"][:, 3:])):
        h = 2 * np.mean([g @ g.T for g in window], axis=0) / 3
        identity = np.eye(len(h))
        if make is rf.published.scale_by_rf_shampoo:
            expected = 0.5 * identity + 0.5 * h
        else:
            m = 0.5 * (h - identity) / 2  # half of the step, for α₂ is 0.5
            expected = identity - 0.5 / max(1, np.linalg.norm(m)) * m
        np.testing.assert_allclose(factors[name][0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.contract
def test_masked_and_partitioned_equal_the_subtree_alone():
    gradients = draw({"a": {"w": (3, 4)}, "b": {"w": (3, 4)}})
    tx = scale_by_published(**SETTING)
    expected, alone = run(tx, {"a": gradients["a"]})
    masked, masked_states = run(optax.masked(tx, {"a": True, "b": False}), gradients)
    both = optax.partition({"tx": tx, "rest": optax.sgd(1.0)}, {"a": "tx", "b": "rest"})
    partitioned, partitioned_states = run(both, gradients)
    assert_close(masked, {"a": expected["a"], "b": gradients["b"]})
    assert_close(partitioned, {"a": expected["a"], "b": {"w": -gradients["b"]["w"]}})
    expected_factors, *found = (
        dense_factors(last(states), params_of({"a": gradients["a"]}))
        for states in (alone, masked_states, partitioned_states)
    )
    for factors in found:
        assert_close(factors, expected_factors)


def test_a_gradient_of_none_leaves_the_factors_of_its_blocks_and_gives_none():
    """The two matrices share a stack; the group has no gradient as a whole."""
    layout = whole(group=(weight_and_bias(),))
    tx = scale_by_published(layout=layout, **SETTING)
    shapes = {"a": (3, 4), "b": (3, 4), "d": {"kernel": (2, 3), "bias": (3,)}}
    first, second = (jax.tree.map(lambda g, i=i: g[i], draw(shapes)) for i in range(2))
    update = jax.jit(tx.update)
    _, state = update(first, tx.init(first))
    all_directions, after_all = update(second, state)
    absent = {**second, "b": None, "d": {"kernel": None, "bias": None}}
    directions, after = update(absent, state, first)
    before, with_all, found = (rf.factors(each, first, layout) for each in (state, after_all, after))
    assert directions["b"] is None
    assert directions["d"] == {"kernel": None, "bias": None}
    assert_close(directions["a"], all_directions["a"])
    assert_close(found["a"], with_all["a"])
    for name in ("b", "d/kernel+bias"):
        chex.assert_trees_all_equal(found[name], before[name])
        assert all(np.abs(k - old).max() > 1e-2 for k, old in zip(with_all[name], before[name], strict=True))


@both_forms
def test_refreshed_factors_are_applied_at_once_and_until_the_next_refresh(make):
    gradients = draw((3,), 8)
    directions, _ = run(make(refresh_every=3, **SETTING), gradients)
    scales = directions / gradients
    np.testing.assert_allclose(scales[[1, 2, 4, 5, 7]], scales[[0, 0, 3, 3, 6]], rtol=1e-5)
    assert np.abs(scales[[0, 3, 6]] - [np.ones(3), *scales[[0, 3]]]).max(axis=1).min() > 1e-2


def test_momentum_is_kept_only_if_there_is_any():
    gradients = draw({"w": (3,)})
    run_with = compile_run(lambda momentum: scale_by_published(riemannian_momentum=momentum, **SETTING))
    expected, states = run_with(gradients, 0.0)
    assert jax.tree.leaves(states.stacks[0].block.momenta)
    for momentum in (None, 0, 0.0):
        tx = scale_by_published(riemannian_momentum=momentum, **SETTING)
        assert jax.eval_shape(tx.init, params_of(gradients)).stacks[0].block.momenta is None
    directions, _ = run(tx, gradients)
    assert_close(directions, expected)


@both_forms
def test_schedules_are_followed(make):
    gradients = draw({"w": (3,)}, steps=4)
    rate, damping = optax.linear_schedule(0.4, 0.1, 3), optax.exponential_decay(2.0, 1, 0.5)
    directions, _ = run(make(rate, damping, batch_size=4), gradients)

    @jax.jit
    def update(gradient, state, rate, damping):
        return make(rate, damping, batch_size=4).update(gradient, state)

    state = make().init({"w": gradients["w"][0]})
    for step in range(4):
        gradient = {"w": gradients["w"][step]}
        # By hand, so that it is these numbers that count and not when a schedule is called.
        direction, state = update(gradient, state, 0.4 - 0.1 * step, 2.0 * 0.5**step)
        assert_close(direction["w"], directions["w"][step])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), in_contract("float16", 4e-3)])
def test_a_kept_preconditioner_changes_nothing_but_the_state(dtype, tolerance):
    """Also before the first refresh, at factors other than one."""
    gradients = draw({"matrix": (4, 3), "vector": (5,)}, steps=5)
    gradients["matrix"] *= 1e-3
    layout = whole(structure="block2diagonal", factor_dtype=dtype)
    setting = {"initial_scale": 1e-4, "refresh_every": lambda count: count % 2 == 1, "layout": layout, **SETTING}
    runs = [run(scale_by_published(cache_preconditioner=kept, **setting), gradients) for kept in (False, True)]
    (directions, states), (directions_by_kept, states_with_kept) = runs
    for one, other in zip(jax.tree.leaves(directions_by_kept), jax.tree.leaves(directions), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
    chex.assert_trees_all_equal(factors_of(states_with_kept), factors_of(states))
    for stack, with_kept in zip(states.stacks, states_with_kept.stacks, strict=True):
        assert stack.block.preconditioners is None
        shapes = jax.tree.map(lambda part: (part.shape, part.dtype), with_kept.block)
        assert shapes.preconditioners == shapes.factors


def test_a_gradient_that_the_factors_did_not_expect_moves_no_further_than_the_radius():
    """Between two refreshes; the other block of the stack is left alone."""
    gradients = draw({"w": (3, 2), "other": (3, 2)}, steps=4)
    gradients["w"][2] *= 1e4
    length = lambda d, g: np.sqrt(4 * np.mean(np.float64(d) * g, axis=(1, 2)))
    newton = {"step_size": "newton", "batch_size": 4, "refresh_every": 4}
    run_within = compile_run(lambda radius: rf.scale_by_sirf_shampoo(None, trust_radius=radius, **newton))
    (free, _), (bound, states) = (run_within(gradients, radius) for radius in (1e30, 4.0))
    unexpected = length(free["w"], gradients["w"])[2]
    assert unexpected > 4.5
    np.testing.assert_allclose(bound["w"][2], free["w"][2] * (4 / unexpected) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(bound["w"], 2, axis=0), np.delete(free["w"], 2, axis=0))
    np.testing.assert_array_equal(bound["other"], free["other"])
    np.testing.assert_array_equal(states.stacks[0].block.shortened, [[0, 0], [0, 0], [0, 1], [0, 1]])


@pytest.mark.parametrize(
    "tx",
    [
        scale_by_published(batch_size=4),
        in_contract(rf.published.scale_by_rf_shampoo(batch_size=4)),
        in_contract(rf.scale_by_sirf_shampoo()),
    ],
    ids=["published", "with inverses", "root-free"],
)
def test_samples_of_curvature_may_lack_a_parameter_that_has_no_gradient(tx):
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones(3)}
    samples = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    update = jax.jit(tx.update)
    directions, _ = update({**params, "b": None}, tx.init(params), params, curvature=samples)
    expected, _ = update(params, tx.init(params), params, curvature=samples)
    assert directions["b"] is None
    chex.assert_trees_all_close(directions["a"], expected["a"], rtol=1e-5)


@pytest.mark.contract
def test_pieces_of_length_one_beside_short_axes_keep_their_state():
    """Their factor is a diagonal's: of another shape than what a mean over a folded matrix has by itself."""
    gradients = draw({"w": (3, 3, 7, 2)}, steps=3)
    directions, states = run(scale_by_published(layout=whole(block_size=3), batch_size=4), gradients)
    chex.assert_tree_all_finite((directions, states))  # a loop, which takes one type of state
    # The block at the start is what a parameter of its own would be.
    alone, _ = run(scale_by_published(batch_size=4), {"w": gradients["w"][:, :, :, :3]})
    np.testing.assert_allclose(directions["w"][:, :, :, :3], alone["w"], rtol=1e-4, atol=1e-5)
    entries, _ = run(scale_by_published(layout=whole(block_size=1), batch_size=4), draw({"w": (2, 2)}))
    chex.assert_tree_all_finite(entries)


def test_a_parameter_without_entries_has_no_block():
    gradients = {"w": np.ones((3, 2), np.float32), "empty": np.ones((0, 3), np.float32)}
    tx = scale_by_published(batch_size=1)
    directions, state = jax.jit(tx.update)(gradients, tx.init(gradients))
    assert [stack.momentum is None for stack in state.stacks] == [True]
    assert directions["empty"].shape == (0, 3)
    np.testing.assert_array_equal(tx.init({"empty": gradients["empty"]}).stacks, 0)
    assert tx.update({}, tx.init({}))[1].count == 1


CHAINS = {
    "sirf_shampoo": rf.sirf_shampoo(optax.linear_schedule(0.1, 0.0, 9), weight_decay=optax.constant_schedule(0.1)),
    "published.sirf_shampoo": rf.published.sirf_shampoo(
        optax.linear_schedule(0.1, 0.0, 9), weight_decay=0.1, batch_size=1
    ),
    "with_inverses": rf.published.rf_shampoo(0.1, weight_decay=0.1, batch_size=1),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_one_count_of_steps(name):
    params = {"w": jnp.ones((2, 3))}
    tx = CHAINS[name]
    state = tx.init(params)
    assert optax.tree.get(state, "count") == 0
    update = jax.jit(tx.update)
    for _ in range(2):
        _, state = update(params, state, params)
    assert optax.tree.get(state, "count") == 2

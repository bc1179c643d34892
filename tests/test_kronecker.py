"""The two Kronecker transformations: blocks, layers and groups; when they refresh; schedules and momentum."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import refuses
from kronecker_runs import PUBLISHED, SETTING, assert_close, both_forms, draw, last, params_of, run, scale_by_published

import rootfree_optax as rf
from rootfree_optax._src.layout import weight_and_bias

BLOCKS = {
    "blocks_of_layers": ({"w": (2, 2, 5)}, rf.Layout(layer_axes=0, block_size=3)),
}


@pytest.mark.parametrize(
    ("make", "case"),
    [
        (scale_by_published, "blocks_of_layers"),
        (rf.scale_by_rf_shampoo, "blocks_of_layers"),
    ],
)
def test_a_block_equals_a_parameter_of_its_own(make, case):
    shapes, layout = BLOCKS[case]
    gradients = draw(shapes)
    plan = layout.plan(params_of(gradients))

    def block_of(array, block):
        size = layout.block_size or max(array.shape)
        window = tuple(slice(i * size, (i + 1) * size) for i in block.index)
        return array[(slice(None), *block.layer, *window)]

    # Named in the reverse order, so that they stand elsewhere in their stacks.
    names = {block.name: f"{len(plan.blocks) - i}" for i, block in enumerate(plan.blocks)}
    assert len(names) > len(shapes)
    cut = lambda tree: {names[block.name]: block_of(tree[block.parameter], block) for block in plan.blocks}
    directions, states = run(make(layout=layout, **SETTING), gradients)
    separate = rf.Layout("dense")
    expected, expected_states = run(make(layout=separate, **SETTING), cut(gradients))
    assert_close(cut(directions), expected)
    expected_factors = separate.plan(params_of(cut(gradients))).factors(last(expected_states))
    factors = plan.factors(last(states))
    assert_close({names[name]: matrices for name, matrices in factors.items()}, expected_factors)


def test_joined_and_merged_parameters_equal_matrices_made_by_hand():
    gradients = draw({"d": {"kernel": (2, 2, 3), "bias": (3,)}, "m": (2, 1, 3, 4)})
    layer = gradients["d"]
    joined = np.concatenate([layer["kernel"].reshape(-1, 4, 3), layer["bias"][:, None]], axis=1)
    by_hand = {"d/kernel+bias": joined, "m": gradients["m"].reshape(-1, 6, 4)}
    layout = rf.Layout(group=(weight_and_bias(),), merge_dims=6)
    directions, states = run(scale_by_published(layout=layout, **SETTING), gradients)
    expected, expected_states = run(scale_by_published(**SETTING), by_hand)
    kernel, bias = np.split(expected["d/kernel+bias"], [4], axis=1)
    split = {"kernel": kernel.reshape(layer["kernel"].shape), "bias": bias[:, 0]}
    assert_close(directions, {"d": split, "m": expected["m"].reshape(gradients["m"].shape)})
    found = layout.plan(params_of(gradients)).factors(last(states))
    assert_close(found, rf.Layout().plan(params_of(by_hand)).factors(last(expected_states)))


@both_forms
def test_curvature_with_samples_reaches_every_block(make):
    """It takes the gradient's place in H, as a mean over samples of their outer products."""
    layout = rf.Layout(block_size=3)
    rng = np.random.default_rng(0)
    gradient = {"w": np.float32(rng.standard_normal((5, 3)))}
    samples = {"w": np.float32(0.7 * rng.standard_normal((4, 5, 3)))}
    tx = make(0.5, 0.0, batch_size=2, layout=layout)
    _, state = jax.jit(lambda g, c: tx.update(g, tx.init(g), curvature=c))(gradient, samples)
    factors = layout.plan(gradient).factors(state)
    for name, window in (("w[0, 0]", samples["w"][:, :3]), ("w[1, 0]", samples["w"][:, 3:])):
        h = 2 * np.mean([g @ g.T for g in window], axis=0) / 3
        identity = np.eye(len(h))
        if make is rf.scale_by_rf_shampoo:
            expected = 0.5 * identity + 0.5 * h
        else:
            m = 0.5 * (h - identity) / 2  # half of the step, for α₂ is 0.5
            expected = identity - 0.5 / max(1, np.linalg.norm(m)) * m
        np.testing.assert_allclose(factors[name][0], expected, rtol=1e-5, atol=1e-6)


def test_masked_and_partitioned_equal_the_subtree_alone():
    gradients = draw({"a": {"w": (3, 4)}, "b": {"w": (3, 4)}})
    tx = scale_by_published(**SETTING)
    expected, alone = run(tx, {"a": gradients["a"]})
    masked, masked_states = run(optax.masked(tx, {"a": True, "b": False}), gradients)
    both = optax.partition({"tx": tx, "rest": optax.sgd(1.0)}, {"a": "tx", "b": "rest"})
    partitioned, partitioned_states = run(both, gradients)
    assert_close(masked, {"a": expected["a"], "b": gradients["b"]})
    assert_close(partitioned, {"a": expected["a"], "b": {"w": -gradients["b"]["w"]}})
    plan = rf.Layout().plan(params_of({"a": gradients["a"]}))
    factors = plan.factors(last(alone))
    assert_close(plan.factors(last(masked_states)), factors)
    assert_close(plan.factors(last(partitioned_states)), factors)


def test_a_gradient_of_none_leaves_the_factors_of_its_blocks_and_gives_none():
    """The two matrices share a stack; the group has no gradient as a whole."""
    layout = rf.Layout(group=(weight_and_bias(),))
    tx = scale_by_published(layout=layout, **SETTING)
    shapes = {"a": (3, 4), "b": (3, 4), "d": {"kernel": (2, 3), "bias": (3,)}}
    first, second = (jax.tree.map(lambda g, i=i: g[i], draw(shapes)) for i in range(2))
    plan = layout.plan(first)
    update = jax.jit(tx.update)
    _, state = update(first, jax.jit(tx.init)(first))
    whole, whole_after = update(second, state)
    absent = {**second, "b": None, "d": {"kernel": None, "bias": None}}
    directions, after = update(absent, state, first)
    before, with_all, found = map(plan.factors, (state, whole_after, after))
    assert directions["b"] is None
    assert directions["d"] == {"kernel": None, "bias": None}
    assert_close(directions["a"], whole["a"])
    assert_close(found["a"], with_all["a"])
    for name in ("b", "d/kernel+bias"):
        chex.assert_trees_all_equal(found[name], before[name])
        assert all(np.abs(k - old).max() > 1e-2 for k, old in zip(with_all[name], before[name], strict=True))


def refreshes(tx, steps):
    """Returns at which steps the factors change at all, and the directions."""
    directions, states = run(tx, draw((3,), steps))
    ((history,),) = getattr(states, "inner_state", states).factors[0]
    history = history.reshape(steps, 3)
    before = np.concatenate([np.ones((1, 3)), history[:-1]])
    return np.flatnonzero((history != before).any(axis=1)).tolist(), directions


def is_third(count):
    return count % 3 == 0


@pytest.mark.parametrize(
    ("make", "how", "update_every"),
    [
        (rf.scale_by_rf_shampoo, "given", 3),
        (scale_by_published, "given", 3),
        (scale_by_published, "given", is_third),
        (scale_by_published, "given", jnp.int32(3)),
        (rf.scale_by_sirf_shampoo, "injected", 3),
        (rf.scale_by_sirf_shampoo, "injected", is_third),
    ],
)
def test_factors_change_every_third_step_however_that_is_said(make, how, update_every):
    constructor = optax.inject_hyperparams(make) if how == "injected" else make
    settings = SETTING | PUBLISHED if make is rf.scale_by_sirf_shampoo else SETTING
    steps, directions = refreshes(constructor(update_every=update_every, **settings), 8)
    assert steps == [0, 3, 6]
    gradients = draw((3,), 8)
    # The refreshed factors are applied at once, and the same until the next refresh.
    scales = directions / gradients
    np.testing.assert_allclose(scales[[1, 2, 4, 5, 7]], scales[[0, 0, 3, 3, 6]], rtol=1e-5)
    assert np.abs(scales[[0, 3, 6]] - [np.ones(3), *scales[[0, 3]]]).max(axis=1).min() > 1e-2


def test_refreshes_at_a_growing_interval():
    steps, _ = refreshes(scale_by_published(update_every=rf.growing_interval(3, base=2.0), **SETTING), 16)
    assert steps == [0, 1, 2, 3, 5, 7, 10, 13]


def test_momentum_is_kept_only_if_there_is_any():
    gradients = draw({"w": (3,)})
    traced = scale_by_published(riemannian_momentum=jnp.float32(0), **SETTING)
    expected, states = run(traced, gradients)
    assert jax.tree.leaves(states.momenta)
    for momentum in (None, 0, 0.0):
        tx = scale_by_published(riemannian_momentum=momentum, **SETTING)
        assert not jax.tree.leaves(jax.eval_shape(tx.init, params_of(gradients)).momenta)
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

    state = make().init(params_of(gradients))
    for step in range(4):
        gradient = {"w": gradients["w"][step]}
        # By hand, so that it is these numbers that count and not when a schedule is called.
        direction, state = update(gradient, state, 0.4 - 0.1 * step, 2.0 * 0.5**step)
        assert_close(direction["w"], directions["w"][step])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_products_change_nothing_but_the_state(dtype):
    """Also where the factors start, but are not refreshed, and where their squares would leave float16's range."""
    gradients = draw({"matrix": (4, 3), "tensor": (2, 3, 2), "vector": (5,)}, steps=5)
    gradients["matrix"] *= 1e-3
    layout = rf.Layout(structure="block2diagonal")
    setting = {"initial_scale": "first_gradient", "update_every": lambda count: count % 2 == 1, "layout": layout}
    runs = [
        run(scale_by_published(preconditioner_dtype=dtype, cache_products=cached, **setting, **SETTING), gradients)
        for cached in (False, True)
    ]
    (directions, states), (cached_directions, cached_states) = runs
    tolerance = 1e-5 if dtype == "float32" else 4e-3
    for one, other in zip(jax.tree.leaves(cached_directions), jax.tree.leaves(directions), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
    chex.assert_trees_all_equal(cached_states.factors, states.factors)
    assert states.products == ()
    plan = dataclasses.replace(layout, factor_dtype=dtype).plan(params_of(gradients))
    found = sum(leaf[0].nbytes for leaf in jax.tree.leaves((cached_states.factors, cached_states.products)))
    assert found == plan.state_bytes(riemannian_momentum=False, cached_products=True)


def test_products_are_cached_for_symmetric_structures_only():
    tx = scale_by_published(cache_products=True, layout=rf.Layout(structure="triltoeplitz"), batch_size=1)
    with refuses(ValueError, "cache_products=True", "closed under transposition", "'triltoeplitz'", "'w'"):
        tx.init({"w": jnp.zeros((3, 4))})

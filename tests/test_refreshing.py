"""Which blocks are refreshed when: all at once, a portion at a time, or in turn."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kronecker_runs import PUBLISHED, scale_by_published

import rootfree_optax as rf

SETTING = {"preconditioner_lr": 0.3, "damping": 1e-2, "riemannian_momentum": None, "batch_size": 4}
SHAPES = {"seven": (7, 3, 4), "two": (2, 5, 2), "one": (6, 6), "vector": (3,)}
LAYOUT = rf.Layout(layer_axes={"seven": 0, "two": 0})


def gradients(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def changed_blocks(before, after):
    """Returns how many blocks of each stack have a factor that changed."""
    return [
        int(sum(np.any(np.asarray(old[0][0]) != np.asarray(new[0][0]), axis=tuple(range(1, old[0][0].ndim)))))
        for old, new in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("period", [1, 3, 4, 10])
@pytest.mark.parametrize("cache_products", [False, True])
def test_in_a_period_every_block_is_refreshed_once_and_no_step_has_more_than_its_share(period, cache_products):
    grads = gradients(SHAPES)
    make = functools.partial(scale_by_published, layout=LAYOUT, cache_products=cache_products, **SETTING)
    together, staggered = make(), make(update_every=period, staggered=True)
    expected_directions, expected = together.update(grads, together.init(grads))
    state = staggered.init(grads)
    counts = [len(factors[0][0]) for factors in state.factors]
    update = jax.jit(staggered.update)
    totals = np.zeros(len(counts), int)
    for _ in range(period):
        directions, new = update(grads, state)
        changed = changed_blocks(state.factors, new.factors)
        assert all(c <= -(-count // period) for c, count in zip(changed, counts, strict=True))
        totals += changed
        state = new
    assert totals.tolist() == counts
    chex.assert_trees_all_close((state.factors, state.products), (expected.factors, expected.products), rtol=1e-5)
    chex.assert_trees_all_close(directions, expected_directions, rtol=1e-4, atol=1e-5)


def test_stacks_of_few_blocks_begin_at_different_steps():
    grads = gradients(SHAPES)
    tx = scale_by_published(layout=LAYOUT, update_every=10, staggered=True, **SETTING)
    state = tx.init(grads)
    steps = []
    for _ in range(10):
        _, new = jax.jit(tx.update)(grads, state)
        steps.append(sum(changed_blocks(state.factors, new.factors)))
        state = new
    # 7 + 2 + 1 + 1 blocks in ten steps
    assert max(steps) <= 2
    assert sum(steps) == 11


def test_a_long_stack_is_refreshed_portion_by_portion_to_the_same_factors():
    grads = gradients({"a": (45, 64, 64)})  # more factors than are refreshed at once, and no multiple of a portion
    settings = {**SETTING, "update_every": 1}
    together = scale_by_published(layout=rf.Layout(layer_axes=0), **settings)
    one = scale_by_published(**settings)
    update = jax.jit(together.update)
    assert "while" in update.lower(grads, together.init(grads)).as_text()
    _, state = update(grads, together.init(grads))
    for index in (0, 31, 32, 44):
        block = {"a": grads["a"][index]}
        _, expected = jax.jit(one.update)(block, one.init(block))
        found = jax.tree.map(lambda factor, index=index: factor[index : index + 1], state.factors)
        chex.assert_trees_all_close(found, expected.factors, rtol=1e-5, atol=1e-6)


def test_staggered_blocks_divide_over_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    grads = gradients({"a": (24, 4, 4), "b": (3, 5, 5)})
    layout = rf.Layout(layer_axes=0)
    make = functools.partial(scale_by_published, layout=layout, update_every=3, staggered=True, **SETTING)
    sharded, together = make(block_axes="data"), scale_by_published(layout=layout, **SETTING)
    placed = jax.device_put(grads, NamedSharding(mesh, PartitionSpec()))
    state = sharded.init(placed)
    for _ in range(3):
        _, state = jax.jit(sharded.update)(placed, state)
    _, expected = together.update(grads, together.init(grads))
    found = jax.tree.map(lambda part, like: np.asarray(part)[: len(like)], state.factors, expected.factors)
    chex.assert_trees_all_close(found, expected.factors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update_every", [rf.growing_interval(10), jnp.int32(3)])
def test_staggering_needs_an_interval_that_is_part_of_the_program(update_every):
    with pytest.raises(ValueError, match="staggered=True needs update_every as a Python int"):
        scale_by_published(update_every=update_every, staggered=True, **SETTING)


def test_staggering_works_under_inject_hyperparams_with_a_static_interval():
    make = optax.inject_hyperparams(rf.scale_by_sirf_shampoo, static_args=("update_every", "staggered", "layout"))
    grads = gradients({"a": (6, 6)})
    settings = {**SETTING, **PUBLISHED, "riemannian_momentum": 0.5}
    tx = make(update_every=3, staggered=True, **settings)
    expected = rf.scale_by_sirf_shampoo(update_every=3, staggered=True, **settings)
    chex.assert_trees_all_close(
        tx.update(grads, tx.init(grads))[0], expected.update(grads, expected.init(grads))[0], rtol=1e-6
    )

"""Weight decay, momentum and step size agree with optax's where optax's work, and keep dtypes where those do not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rootfree_optax.chaining import add_decayed_weights, heavy_ball, scale_by_learning_rate

TREE = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array(0.5)}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (add_decayed_weights(0.1), optax.add_decayed_weights(0.1)),
        (add_decayed_weights(0.1, {"w": True, "b": False}), optax.add_decayed_weights(0.1, {"w": True, "b": False})),
        (heavy_ball(0.9), optax.trace(0.9)),
        (scale_by_learning_rate(0.1), optax.scale_by_learning_rate(0.1)),
        (
            scale_by_learning_rate(optax.linear_schedule(0.0, 1.0, 4)),
            optax.scale_by_learning_rate(optax.linear_schedule(0.0, 1.0, 4)),
        ),
    ],
)
def test_agrees_with_optax(ours, theirs):
    state, other = ours.init(TREE), theirs.init(TREE)
    for step in range(4):
        updates = jax.tree.map(lambda p, step=step: jnp.sin(p + step), TREE)
        result, state = ours.update(updates, state, TREE)
        expected, other = theirs.update(updates, other, TREE)
        chex.assert_trees_all_close(result, expected, rtol=1e-6)


def test_scheduled_weight_decay_follows_its_schedule():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    tx = add_decayed_weights(schedule)
    state = tx.init(TREE)
    for step in range(6):
        result, state = tx.update(TREE, state, TREE)
        # Not optax's own with the schedule: before 0.2.7 its count stands still.
        fixed = optax.add_decayed_weights(schedule(step))
        expected, _ = fixed.update(TREE, fixed.init(TREE), TREE)
        chex.assert_trees_all_close(result, expected, rtol=1e-6)


@pytest.mark.parametrize("factory", [add_decayed_weights, heavy_ball, scale_by_learning_rate])
def test_keeps_half_precision_under_traced_numbers(factory):
    params = jnp.ones(3, jnp.bfloat16)

    @jax.jit
    def step(number):
        tx = factory(number)
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        chex.assert_trees_all_equal_dtypes(state, new_state)
        return updates

    assert step(jnp.float32(0.25)).dtype == jnp.bfloat16


def test_momentum_dtype():
    tx = heavy_ball(0.5, accumulator_dtype=jnp.bfloat16)
    state = tx.init(jnp.zeros(2))
    for _ in range(2):
        updates, state = tx.update(jnp.full(2, 1 / 3), state)
    assert state.momentum.dtype == jnp.bfloat16
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(updates, 0.5, rtol=2**-8)


def test_weight_decay_without_parameters_is_an_error():
    tx = add_decayed_weights(0.1)
    with pytest.raises(ValueError, match=r"needs the parameters: call tx.update\(grads, state, params\)"):
        tx.update(TREE, tx.init(TREE))

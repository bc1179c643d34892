"""Weight decay, momentum and step size agree with optax's where optax's work, and keep dtypes where those do not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rootfree_optax as rf
from rootfree_optax._src.optimizers.links import add_decayed_weights, descend, heavy_ball, scale_by_learning_rate

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
        chex.assert_trees_all_close(result, expected, rtol=1e-5)


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
    tx = heavy_ball(0.5, mu_dtype=jnp.bfloat16)
    state = tx.init(jnp.zeros(2))
    for _ in range(2):
        updates, state = tx.update(jnp.full(2, 1 / 3), state)
    assert state.momentum.dtype == jnp.bfloat16
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(updates, 0.5, rtol=2**-8)


def test_a_wide_accumulator_adds_up_what_half_precision_cannot():
    tx = heavy_ball(0.999, mu_dtype=jnp.float32)
    ones = jnp.ones(1, jnp.bfloat16)
    step = lambda state, _: (tx.update(ones, state)[1], None)
    state, _ = jax.lax.scan(step, tx.init(ones), None, length=3000)
    np.testing.assert_allclose(state.momentum, (1 - 0.999**3000) / 0.001, rtol=1e-3)


def test_weight_decay_without_parameters_is_an_error():
    tx = add_decayed_weights(0.1)
    with pytest.raises(ValueError, match=r"needs the parameters: call tx.update\(grads, state, params\)"):
        tx.update(TREE, tx.init(TREE))


def test_parameters_may_be_python_numbers():
    tx = rf.rf_adamw(0.1, weight_decay=0.5)
    params = {"w": 1.0}
    updates, _ = tx.update({"w": jnp.float32(2.0)}, tx.init(params), params)
    expected, _ = tx.update({"w": jnp.float32(2.0)}, tx.init({"w": jnp.float32(1.0)}), {"w": jnp.float32(1.0)})
    assert updates["w"] == expected["w"]


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float16, 6e4), (jnp.bfloat16, 3.4e38)], ids=["float16", "bfloat16"])
def test_a_velocity_beyond_its_range_comes_back(dtype, size):
    """Also from what bfloat16 would round to infinity, and float32 holds."""
    tx = heavy_ball(0.5, mu_dtype=dtype)
    state = tx.init(jnp.zeros(2))
    for update in ([size, 1.0], [size, 1.0], [0.0, 0.0]):
        velocity, state = tx.update(jnp.array(update), state)
    np.testing.assert_array_equal(velocity, [float(jnp.finfo(dtype).max) / 2, 0.75])


def test_a_non_finite_update_shows_once_and_leaves_the_velocity():
    tx = heavy_ball(0.5)
    state = tx.init(jnp.zeros(3))
    for update in ([1.0, 1.0, 1.0], [1.0, np.nan, np.inf], [1.0, 1.0, 1.0]):
        velocity, state = tx.update(jnp.array(update), state)
        np.testing.assert_array_equal(np.isfinite(velocity), np.isfinite(update))
    np.testing.assert_array_equal(velocity, [1.75, 1.5, 1.5])


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_weight_decay_is_coupled_with_the_momentum_that_descend_is_given(momentum):
    """Two steps of a direction of zero: the decay alone, with and without what momentum adds to it."""
    links = descend(0.5, 0.1, None, heavy_ball(momentum))
    tx, params = optax.chain(*links), {"w": jnp.float32(2.0)}
    state, zero = tx.init(params), {"w": jnp.float32(0.0)}
    first, state = tx.update(zero, state, params)
    second, _ = tx.update(zero, state, params)
    np.testing.assert_allclose([first["w"], second["w"]], [-0.1, -0.1 if momentum is None else -0.15], rtol=1e-6)


@pytest.mark.parametrize("make", [rf.rf_adamw, rf.sirf_shampoo, rf.published.sirf_shampoo])
def test_a_chain_has_one_count(make):
    """The preconditioner's: the links call theirs `step`."""
    tx = make(optax.constant_schedule(0.1), weight_decay=0.1)
    _, state = tx.update(TREE, tx.init(TREE), TREE, batch_size=1)
    assert optax.tree.get(state, "count") == 1


def test_a_learning_rate_below_half_precision_still_counts():
    tx = scale_by_learning_rate(1e-8)  # zero as a float16
    updates, _ = tx.update(jnp.full(3, 2000, jnp.float16), tx.init(jnp.zeros(3)))
    assert updates.dtype == jnp.float16
    np.testing.assert_allclose(np.float32(updates), -2e-5, rtol=1e-2)


@pytest.mark.parametrize("with_params", [True, False])
def test_a_small_learning_rate_is_not_lost_in_the_dtype_of_narrow_updates(with_params):
    update, params = jnp.ones(3, jnp.float16), jnp.ones(3, jnp.float32)
    tx = scale_by_learning_rate(1e-9)
    scaled, _ = tx.update(update, tx.init(params), params if with_params else None)
    assert scaled.dtype == (jnp.float32 if with_params else jnp.float16)
    np.testing.assert_allclose(scaled, -1e-9 if with_params else 0, rtol=1e-6)

"""Weight decay, momentum and step size agree with optax's where optax's work, and keep dtypes where those do not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rootfree_optax as rf
from rootfree_optax._src.optimizers.links import HeavyBallState, add_decayed_weights, heavy_ball, scale_by_learning_rate

TREE = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array(0.5)}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (add_decayed_weights(0.1), optax.add_decayed_weights(0.1)),
        (add_decayed_weights(0.1, {"w": True, "b": False}), optax.add_decayed_weights(0.1, {"w": True, "b": False})),
        (heavy_ball(0.9), optax.trace(0.9)),
        (heavy_ball(0.9, nesterov=True), optax.trace(0.9, nesterov=True)),
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


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_wide_accumulator_adds_up_what_half_precision_cannot(nesterov):
    tx = heavy_ball(0.999, nesterov=nesterov, accumulator_dtype=jnp.float32)
    ones = jnp.ones(1, jnp.bfloat16)
    step = lambda state, _: (tx.update(ones, state)[1], None)
    state, _ = jax.lax.scan(step, tx.init(ones), None, length=3000)
    np.testing.assert_allclose(state.momentum, (1 - 0.999**3000) / 0.001, rtol=1e-3)


def test_momentum_of_large_half_precision_gradients_stays_within_its_range():
    tx = rf.scale_by_sirf_shampoo(0.1, batch_size=1, momentum=0.875, initial_scale=1.0)
    large, small = jnp.full((3, 2), 30000, jnp.float16), jnp.ones((3, 2), jnp.float16)
    state = tx.init(large)
    for gradient in (large, large, large, small):
        _, state = tx.update(gradient, state)
        assert np.isfinite(state.velocity[0]).all()


def test_weight_decay_without_parameters_is_an_error():
    tx = add_decayed_weights(0.1)
    with pytest.raises(ValueError, match=r"needs the parameters: call tx.update\(grads, state, params\)"):
        tx.update(TREE, tx.init(TREE))


@pytest.mark.parametrize("make", [rf.sirf_shampoo, rf.rf_shampoo])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_gradients_is_preconditioned_by_the_curvature_of_the_gradients(make, nesterov):
    options = {"preconditioner_lr": 0.3, "damping": 0.1, "batch_size": 3, "update_every": 2}
    tx = make(0.5, momentum=0.75, momentum_of="gradients", nesterov=nesterov, weight_decay=0.25, **options)
    alone = make(1.0, momentum=None, **options)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)}
    state, state_alone = tx.init(params), alone.init(params)
    velocity = np.zeros((3, 2))
    for seed in range(1, 5):
        gradients = {"w": jnp.asarray(np.random.default_rng(seed).normal(size=(3, 2)), jnp.float32)}
        updates, state = tx.update(gradients, state, params)
        _, state_alone = alone.update(gradients, state_alone, params)
        chex.assert_trees_all_equal(state[0].factors, state_alone[0].factors)
        first, second = (np.asarray(k, np.float64) for k in rf.Layout().plan(params).factors(state_alone)["w"])
        if make is rf.sirf_shampoo:
            first, second = first @ first.T, second @ second.T
        else:
            first, second = np.linalg.inv(first), np.linalg.inv(second)
        velocity = 0.75 * velocity + np.asarray(gradients["w"])
        average = np.asarray(gradients["w"]) + 0.75 * velocity if nesterov else velocity
        expected = -0.5 * (first @ average @ second + 0.25 * np.asarray(params["w"]))
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [rf.sirf_shampoo, rf.rf_shampoo])
def test_without_momentum_its_kind_says_nothing(make):
    states = [
        make(0.1, momentum=None, momentum_of=of, nesterov=nesterov, batch_size=1).init(TREE)
        for of in ("gradients", "directions")
        for nesterov in (False, True)
    ]
    for state in states:
        chex.assert_trees_all_equal_shapes_and_dtypes(state, states[0])
    assert states[0][0].velocity == ()
    assert not any(isinstance(link, HeavyBallState) for link in states[0])


@pytest.mark.parametrize("make", [rf.scale_by_sirf_shampoo, rf.scale_by_rf_shampoo])
def test_momentum_of_gradients_has_its_own_dtype_and_keeps_nothing_that_is_not_finite(make):
    tx = make(0.1, batch_size=1, momentum=0.5, nesterov=True, accumulator_dtype=jnp.bfloat16)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = tx.init(params)
    assert {v.dtype for v in state.velocity} == {jnp.dtype(jnp.bfloat16)}
    _, state = tx.update(params, state)
    bad = {**params, "w": params["w"].at[1, 1].set(jnp.nan)}
    direction, after = tx.update(bad, state)
    assert not np.isfinite(direction["w"]).all()
    flat = lambda state: np.concatenate([np.float32(v).ravel() for v in state.velocity])
    assert sorted(flat(after)) == [1.0, *[1.5] * 7]
    with pytest.raises(ValueError, match=r"momentum must be given for nesterov=True, got None"):
        make(0.1, nesterov=True)


def test_a_kind_of_momentum_that_is_none_is_an_error():
    with pytest.raises(ValueError, match=r"momentum_of must be one of 'directions', 'gradients', got 'steps'"):
        rf.rf_shampoo(0.1, batch_size=1, momentum_of="steps")


def test_parameters_may_be_python_numbers():
    tx = rf.rf_adamw(0.1, weight_decay=0.5, batch_size=1)
    params = {"w": 1.0}
    updates, _ = tx.update({"w": jnp.float32(2.0)}, tx.init(params), params)
    expected, _ = tx.update({"w": jnp.float32(2.0)}, tx.init({"w": jnp.float32(1.0)}), {"w": jnp.float32(1.0)})
    assert updates["w"] == expected["w"]


def test_a_velocity_beyond_its_range_is_not_infinite_for_good():
    tx = heavy_ball(0.5, accumulator_dtype=jnp.float16)
    state = tx.init(jnp.zeros(2))
    for update in ([6e4, 1.0], [6e4, 1.0], [0.0, 0.0]):
        velocity, state = tx.update(jnp.array(update), state)
    np.testing.assert_array_equal(velocity, [32752.0, 0.75])  # half of float16's largest number

"""The published diagonal methods against an independent float64 version in NumPy, and their invariance."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rootfree_optax as rf

STEPS = 12
SHAPES = [(), (3,), (2, 1, 4)]


def gradients_of(seed: int, scale: float = 1.0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[np.asarray(scale * rng.standard_normal(s), np.float32) for s in SHAPES] for _ in range(STEPS)]


def numpy_rms(params, gradients, *, lr, decay, damping, momentum, weight_decay, batch_size, initial_scale):
    params = [np.asarray(p, np.float64) for p in params]
    s = [np.full(p.shape, initial_scale) for p in params]
    v = [np.zeros(p.shape) for p in params]
    for step in gradients:
        for i, g in enumerate(np.asarray(leaf, np.float64) for leaf in step):
            s[i] = decay * s[i] + (1 - decay) * batch_size * g**2
            v[i] = momentum * v[i] + g / (s[i] + damping) + weight_decay * params[i]
            params[i] = params[i] - lr * v[i]
    return params


def numpy_adam(params, gradients, *, lr, b1, b2, damping, weight_decay, batch_size, initial_scale, bias_correction):
    params = [np.asarray(p, np.float64) for p in params]
    s = [np.full(p.shape, initial_scale) for p in params]
    m = [np.zeros(p.shape) for p in params]
    for t, step in enumerate(gradients, start=1):
        m_weight, s_weight = (1 - b1**t, 1 - b2**t) if bias_correction else (1.0, 1.0)
        for i, g in enumerate(np.asarray(leaf, np.float64) for leaf in step):
            m[i] = b1 * m[i] + (1 - b1) * g
            s[i] = b2 * s[i] + (1 - b2) * batch_size * g**2
            direction = (m[i] / m_weight) / (s[i] / s_weight + damping)
            params[i] = params[i] - lr * (direction + weight_decay * params[i])
    return params


def run(tx, params, gradients, **extra):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in gradients:
        updates, state = update([jnp.asarray(g) for g in step], state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


INITIAL = [jnp.asarray(p) for p in gradients_of(seed=99)[0]]
RMS = {"decay": 0.9, "damping": 1e-3, "batch_size": 8.0, "initial_scale": 1.0, "momentum": 0.5, "weight_decay": 0.1}
RMS_SETTINGS = [
    RMS,
    RMS | {"initial_scale": 0.0},
    RMS | {"batch_size": 1.0},
    RMS | {"decay": 0.0},
    RMS | {"decay": 0.999, "initial_scale": 0.25, "momentum": 0.0},
]
ADAM = {
    "b1": 0.9,
    "b2": 0.95,
    "damping": 1e-3,
    "batch_size": 8.0,
    "initial_scale": 1.0,
    "weight_decay": 0.1,
    "bias_correction": False,
}
ADAM_SETTINGS = [
    ADAM,
    ADAM | {"initial_scale": 0.0, "bias_correction": True, "b2": 0.999},
    ADAM | {"batch_size": 1.0},
    ADAM | {"b1": 0.0, "b2": 0.0, "bias_correction": True},
]


@pytest.mark.parametrize("setting", RMS_SETTINGS)
def test_rf_rmsprop_agrees_with_numpy(setting):
    gradients = gradients_of(seed=0)
    params, _ = run(rf.published.rf_rmsprop(0.05, **setting), INITIAL, gradients)
    expected = numpy_rms(INITIAL, gradients, lr=0.05, **setting)
    chex.assert_trees_all_close(params, [np.float32(p) for p in expected], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("setting", ADAM_SETTINGS)
def test_rf_adamw_agrees_with_numpy(setting):
    gradients = gradients_of(seed=1)
    params, _ = run(rf.published.rf_adamw(0.05, **setting), INITIAL, gradients)
    expected = numpy_adam(INITIAL, gradients, lr=0.05, **setting)
    chex.assert_trees_all_close(params, [np.float32(p) for p in expected], rtol=2e-5, atol=1e-6)


def test_batch_size_at_update_wins_and_scales_the_curvature():
    gradients = gradients_of(seed=2)
    _, at_update = run(rf.published.scale_by_rf_rms(batch_size=3), INITIAL, gradients, batch_size=64)
    _, at_construction = run(rf.published.scale_by_rf_rms(batch_size=64), INITIAL, gradients)
    chex.assert_trees_all_equal(at_update.nu, at_construction.nu)
    # √B in the gradient is B in its square.
    scaled = gradients_of(seed=2, scale=8.0)
    _, by_gradient = run(rf.published.scale_by_rf_rms(batch_size=1), INITIAL, scaled)
    chex.assert_trees_all_close(at_update.nu, by_gradient.nu, rtol=1e-6)


@given(
    exponents=st.lists(st.integers(-6, 6), min_size=4, max_size=4),
    method=st.sampled_from(["rms", "adam"]),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_undamped_iterates_do_not_depend_on_a_diagonal_reparameterisation(exponents, method):
    """θ = Dθ' with s' started at D² gives θ' = D⁻¹θ. Powers of two make the scaling exact."""
    d = np.exp2(np.asarray(exponents)).astype(np.float32)
    factory = {"rms": rf.published.scale_by_rf_rms, "adam": rf.published.scale_by_rf_adam}[method]
    tx = factory(damping=0.0, batch_size=4)
    rng = np.random.default_rng(3)
    params, state = jnp.ones(4), tx.init(jnp.ones(4))
    scaled_params, scaled_state = params / d, state._replace(nu=jnp.asarray(d**2))
    for _ in range(5):
        slope = rng.standard_normal(4).astype(np.float32)
        direction, state = tx.update(slope * params, state)
        scaled_direction, scaled_state = tx.update(d * slope * (d * scaled_params), scaled_state)
        params, scaled_params = params - 0.1 * direction, scaled_params - 0.1 * scaled_direction
    np.testing.assert_allclose(d * scaled_params, params, rtol=1e-5)


def test_the_root_breaks_that_invariance():
    """The same experiment with optax's RMSProp, to show that the property above is one that can fail."""
    d = np.float32([4.0, 0.25])
    tx = optax.scale_by_rms(decay=0.9, eps=0.0, initial_scale=1.0)
    params = jnp.ones(2)
    direction, _ = tx.update(params, tx.init(params))
    scaled_direction, _ = tx.update(d * params, tx.init(params)._replace(nu=jnp.asarray(d**2)))
    assert np.abs(d * scaled_direction / direction - 1).min() > 0.5


def test_curvature_takes_the_gradients_place_in_the_second_moment():
    tx = rf.published.scale_by_rf_rms(decay=0.5, damping=0.0, batch_size=2)
    params = {"w": jnp.zeros(2)}
    gradient = {"w": jnp.array([1.0, -1.0])}
    samples = np.float32([[3.0, 0.0], [1.0, 2.0]])
    direction, state = tx.update(gradient, tx.init(params), curvature={"w": jnp.asarray(samples)})
    expected = 0.5 + 0.5 * 2 * (samples**2).mean(axis=0)
    np.testing.assert_allclose(state.nu["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(direction["w"], gradient["w"] / expected, rtol=1e-6)
    one_sample, _ = tx.update(gradient, tx.init(params), curvature=gradient)
    chex.assert_trees_all_equal(one_sample, tx.update(gradient, tx.init(params))[0])
    with pytest.raises(ValueError, match=r"curvature must have the parameters' shapes, got \(3,\) at 'w'"):
        tx.update(gradient, tx.init(params), curvature={"w": jnp.zeros(3)})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulators_follow_a_slow_average(dtype):
    """Rounded to nearest, s would never leave one: (1 − decay)·(g² − s) is below its resolution."""
    decay, steps = 0.9995, 4000
    gradient = jnp.array([0.5, 1.0, 1.2])
    tx = rf.published.scale_by_rf_rms(decay=decay, damping=0.0, batch_size=1, nu_dtype=dtype)
    state = jax.lax.fori_loop(0, steps, lambda _, state: tx.update(gradient, state)[1], tx.init(jnp.zeros(3)))
    expected = decay**steps + (1 - decay**steps) * np.float64(gradient) ** 2
    assert state.nu.dtype == dtype
    np.testing.assert_allclose(np.float64(state.nu), expected, rtol=0.01)


def test_a_square_beyond_float32_counts_as_the_largest_number():
    """Kept as it was, s would make the step 1e18 times as long as a usual one."""
    tx = rf.published.scale_by_rf_rms(batch_size=1e6)
    direction, state = tx.update(jnp.array([1e18, 1.0, np.nan]), tx.init(jnp.zeros(3)))
    np.testing.assert_allclose(state.nu, [np.finfo(np.float32).max, 0.8 + 0.2e6, 1.0], rtol=1e-6)
    assert float(direction[0]) < 1e-19


@pytest.mark.parametrize("make", [rf.published.scale_by_rf_rms, rf.published.scale_by_rf_adam])
def test_undamped_zero_over_zero_is_zero(make):
    """The average s reaches zero after 391 steps of RF-RMSProp, and 828 of RF-Adam."""
    tx, zero = make(damping=0.0, batch_size=8), jnp.zeros(2)
    step = lambda _, carry: tx.update(zero, carry[1])
    direction, state = jax.lax.fori_loop(0, 2000, step, (zero, tx.init(zero)))
    assert float(state.nu.max()) == 0
    np.testing.assert_array_equal(direction, 0)


def test_spike_is_forgotten():
    """A gradient of 10⁶ raises s at once, so the step stays bounded, and s returns at the rate of decay."""
    tx = rf.published.scale_by_rf_rms(decay=0.9, damping=0.0, batch_size=1)
    state = tx.init(jnp.zeros(()))
    direction, state = tx.update(jnp.float32(1e6), state)
    assert float(direction) == pytest.approx(1e-5, rel=1e-3)
    for _ in range(300):
        direction, state = tx.update(jnp.float32(1.0), state)
    assert float(direction) == pytest.approx(1.0, rel=1e-2)

"""Adam with a relative ε: Optax's Adam where ε does not count, and none of its faults with the loss's scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rootfree_optax._src.transforms.adam import scale_by_relative_adam


def run(tx, gradients):
    params = jnp.zeros(gradients.shape[1:], gradients.dtype)
    step = lambda state, gradient: tx.update(gradient, state, params)[::-1]
    state, directions = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g))(gradients)
    return np.asarray(directions, np.float64), state


def noise(steps=30, shape=(5, 4), dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((steps, *shape)), dtype)


@pytest.mark.usefixtures("standard_promotion")
def test_without_epsilon_it_is_optaxs():
    ours, _ = run(scale_by_relative_adam(0.9, 0.95, 0.0), noise())
    optaxs, _ = run(optax.scale_by_adam(0.9, 0.95, 0.0), noise())
    np.testing.assert_allclose(ours, optaxs, rtol=2e-5, atol=2e-6)


def test_epsilon_is_relative_to_the_parameters_own_gradients():
    gradients = noise()
    directions, _ = run(scale_by_relative_adam(0.9, 0.95, 0.5), gradients)
    m, v = np.zeros((5, 4)), np.zeros((5, 4))
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.95**t)
        expected = m_hat / (np.sqrt(v_hat) + 0.5 * np.sqrt(np.mean(v_hat)))
        np.testing.assert_allclose(directions[t - 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e6, 1e12])
def test_a_multiple_of_the_loss_has_the_same_directions(scale):
    tx = scale_by_relative_adam(eps=1e-3)
    usual, _ = run(tx, noise())
    scaled, _ = run(tx, scale * noise())
    np.testing.assert_allclose(scaled, usual, rtol=0, atol=1e-5)


def test_a_spike_beyond_the_range_of_squares_is_one_step_long():
    directions, state = run(scale_by_relative_adam(), noise().at[10].multiply(1e20).at[20, 0, 0].set(jnp.nan))
    assert np.argwhere(~np.isfinite(directions)).tolist() == [[20, 0, 0]]
    assert np.nanmax(np.abs(directions)) < 3
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_float16_holds_no_squares_so_that_they_are_kept_in_single_precision():
    usual, _ = run(scale_by_relative_adam(), noise())
    for size in (1e-4, 1e3):
        directions, state = run(scale_by_relative_adam(), (size * noise()).astype(jnp.float16))
        assert state.nu.dtype == jnp.float32
        np.testing.assert_allclose(directions, usual, rtol=0, atol=0.02)
    assert scale_by_relative_adam().init(jnp.zeros(3, jnp.bfloat16)).nu.dtype == jnp.bfloat16

"""The scale-free diagonal transformations step by step against NumPy: averages, silence, lengths, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rootfree_optax as rf

STEPS, SHAPE, DAMPING = 12, (4, 3), 0.1
MAKE = {"rf_rms": rf.scale_by_rf_rms, "rf_adam": rf.scale_by_rf_adam}


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def draw(steps=STEPS):
    """Returns gradients whose first row is silent now and then, and whose last row is silent at first."""
    gradients = np.random.default_rng(0).standard_normal((steps, *SHAPE))
    gradients[1::2, 0] = 0
    gradients[:3, -1] = 0
    return gradients


def run(tx, gradients, **extra):
    gradients = jnp.asarray(gradients)
    params = jnp.zeros(gradients.shape[1:], gradients.dtype)
    step = lambda state, gradient: tx.update(gradient, state, params, **extra)[::-1]
    state, directions = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g))(gradients)
    return np.asarray(directions, np.float64), state


def divide(numerator, denominator):
    with np.errstate(all="ignore"):
        return np.where((numerator == 0) & (denominator == 0), 0, numerator / denominator)


def reference(make, gradients, length):
    """Yields the directions, by the formulas of the docstrings; `length` makes one of m, s and s + ρ·mean(s)."""
    m, s = np.zeros(SHAPE), np.zeros(SHAPE)
    for t, g in enumerate(gradients, start=1):
        weight = max(0.05, 1 / t)
        s = np.where(g == 0, s, np.where(s == 0, g**2, s + weight * (g**2 - s)))
        m = 0.9 * m + 0.1 * g
        average = g if make is rf.scale_by_rf_rms else m / (1 - 0.9**t)
        yield length(average, s, s + DAMPING * np.mean(s))


def adams_length(average, s, damped):
    rms = lambda array: np.sqrt(np.mean(array**2))
    direction = divide(average, damped)
    return direction * rms(divide(average, np.sqrt(s))) / rms(direction)


def test_a_direction_of_adamws_length_is_numpys(make):
    gradients = draw()
    directions, state = run(make(), np.float32(gradients))
    expected = np.stack(list(reference(make, gradients, adams_length)))
    np.testing.assert_allclose(directions, expected, rtol=1e-4, atol=1e-5)
    assert np.all(state.nu > 0)


@pytest.mark.parametrize("at_update", [False, True])
def test_newtons_step_is_numpys(make, at_update):
    gradients = draw()
    given = {} if at_update else {"batch_size": 8}
    tx = make(step_size="newton", absolute_damping=0.5, **given)
    directions, _ = run(tx, np.float32(gradients), **({"batch_size": 8} if at_update else {}))
    newton = lambda average, s, damped: average / (8 * damped + 0.5)
    expected = np.stack(list(reference(make, gradients, newton)))
    np.testing.assert_allclose(directions, expected, rtol=1e-4, atol=1e-5)


def test_curvature_of_samples_takes_the_gradients_place(make):
    gradients, samples = np.float32(draw(1)[0]), np.float32(np.random.default_rng(1).standard_normal((5, *SHAPE)))
    tx = make()
    _, state = tx.update(jnp.asarray(gradients), tx.init(jnp.zeros(SHAPE)), curvature=jnp.asarray(samples))
    np.testing.assert_allclose(state.nu, np.mean(samples**2, axis=0), rtol=1e-5)


def test_what_an_entry_knows_survives_its_silence(make):
    gradients = draw(40)
    gradients[5:, 1] = 0
    _, early = run(make(), np.float32(gradients[:5]))
    _, late = run(make(), np.float32(gradients))
    np.testing.assert_array_equal(early.nu[1], late.nu[1])


def test_a_spike_and_a_non_finite_entry_leave_the_state_finite(make):
    gradients = np.float32(draw(30))
    gradients[6] *= np.float32(1e25)
    gradients[12, 1, 1] = np.inf
    directions, state = run(make(), gradients)
    assert not np.isfinite(directions[12]).all()
    assert np.isfinite(np.delete(directions, 12, axis=0)).all()
    assert np.abs(np.delete(directions, 12, axis=0)).max() < 5
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_float16_holds_no_squares_so_that_they_are_kept_in_single_precision(make, size):
    usual, _ = run(make(), np.float32(draw()))
    directions, state = run(make(), np.float16(size * draw()))
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(directions, usual, rtol=0, atol=0.03)
    assert make(nu_dtype=jnp.float16).init(jnp.zeros(2)).nu.dtype == jnp.float16
    assert make().init(jnp.zeros(2, jnp.bfloat16)).nu.dtype == jnp.bfloat16


@pytest.mark.parametrize(("tx", "longest"), [(rf.scale_by_rf_adam(), 2.5), (rf.scale_by_rf_rms(), 10.0)])
def test_an_entry_among_many_tiny_ones_is_bounded(tx, longest):
    """A surprise is four times as long along a gradient as along an average. It was 64 learning rates long."""
    gradient = 1e-7 * jax.random.normal(jax.random.key(0), (64, 64))
    gradient = gradient.at[3, 5].set(1)
    direction, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(jnp.max(jnp.abs(direction)), longest, rtol=1e-5)

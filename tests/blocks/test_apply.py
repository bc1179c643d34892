"""How long a direction may become, and what a block that is too long has of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kronecker_runs import quick_jit

from rootfree_optax._src.blocks.apply import clip_to_trust_radius
from rootfree_optax._src.blocks.rule import Step
from rootfree_optax._src.blocks.sirf import ExactRefresh
from rootfree_optax._src.structures import structure_factory


@functools.partial(quick_jit, static_argnames="batch_size")
def clip(direction, gradient, radius, batch_size=3.0):
    as_floats = [jnp.asarray(array, jnp.float32) for array in (direction, gradient)]
    return clip_to_trust_radius(*as_floats, trust_radius=radius, batch_size=batch_size)


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_a_direction_is_shortened_to_the_trust_radius(size):
    """Lengths up to 10³⁰, whose squares float32 does not hold."""
    rng = np.random.default_rng(0)
    gradient = np.float32(size * rng.standard_normal((4, 3)))
    direction = 2 * gradient  # a curvature of a half
    length = np.sqrt(3 * np.mean(np.float64(gradient) * direction))
    shortened, is_long = clip(direction, gradient, np.float32(0.5 * length))
    np.testing.assert_allclose(shortened, 0.5 * direction, rtol=1e-5)
    assert is_long
    whole, is_long = clip(direction, gradient, np.float32(1.01 * length))
    np.testing.assert_array_equal(whole, direction)
    assert not is_long


def test_directions_without_a_length_stay_as_they_are():
    rng = np.random.default_rng(0)
    gradient = np.float32(rng.standard_normal((4, 3)))
    cases = [(np.zeros((4, 3), np.float32),) * 2, (-gradient, gradient)]
    for value in (np.nan, np.inf, -np.inf):
        bad = gradient.copy()
        bad[1, 2] = value
        cases.append((bad, bad))
    for direction, of_gradient in cases:
        found, is_long = clip(direction, of_gradient, np.float32(0.1))
        np.testing.assert_array_equal(found, direction)
        assert not is_long


def test_the_trust_radius_has_a_derivative_where_a_gradient_is_zero():
    # Not `clip`: before JAX 0.12 a program with compiler options can't stand in another.
    length = lambda radius, gradient: jnp.sum(
        clip_to_trust_radius(gradient, gradient, trust_radius=radius, batch_size=4)[0]
    )
    assert jax.grad(length)(0.5, jnp.zeros(3)) == 0
    np.testing.assert_allclose(jax.grad(length)(0.5, jnp.full(3, 2.0)), 6 / 4)  # of three twos, four long


def test_directions_beyond_the_radius_are_counted():
    """The factors of a half expect gradients of √B·G of two."""
    structures = tuple(structure_factory("dense")(d) for d in (4, 3))
    rule = ExactRefresh(trust_radius=2.0)
    state = rule.init(structures, [jnp.float32] * 2)
    state = state._replace(factors=tuple((0.5**0.5 * matrix,) for (matrix,) in state.factors))
    gradient = np.float32(np.random.default_rng(0).standard_normal((4, 3)))
    step = Step(jnp.int32(0), 0.1, 0.01, batch_size=4.0)
    precondition = quick_jit(lambda state, g: rule.precondition(state, g, gradient=g, structures=structures, step=step))
    short, state = precondition(state, gradient)
    np.testing.assert_allclose(short, gradient / 4, rtol=1e-5)
    assert state.shortened == 0
    long, state = precondition(state, 100 * gradient)
    expected = 2 / np.sqrt(4 * np.mean(np.square(100 * gradient) / 4))
    np.testing.assert_allclose(long, expected * 25 * gradient, rtol=1e-5)
    assert state.shortened == 1
    _, state = precondition(state, np.full_like(gradient, np.nan))
    assert state.shortened == 1
    _, state = precondition(state, 100 * gradient)
    assert state.shortened == 2

"""The scale-free diagonal steps against NumPy in double precision, and what they do with zeros and huge entries."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_optax._src.blocks.diagonal import (
    adam_step,
    average_square,
    damp_relatively,
    limit_to_squares,
    newton_step,
    root_free_step,
)

SHAPES = [(5,), (3, 4), ()]


def draw(shape, seed, *, is_complex=False):
    real, imaginary = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    return real + 1j * imaginary if is_complex else real


def divide(numerator, denominator):
    with np.errstate(all="ignore"):
        return np.where((numerator == 0) & (denominator == 0), 0, numerator / denominator)


def rms(array):
    return np.sqrt(np.mean(np.abs(array) ** 2))


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5 * np.max(np.abs(expected), initial=0))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 99),
    is_complex=st.booleans(),
    zeros=st.booleans(),
    damping=st.sampled_from([0.0, 0.1, 10.0]),
    size=st.sampled_from([1e-9, 1.0, 1e6]),
)
def test_the_three_steps_are_numpys(shape, seed, is_complex, zeros, damping, size):
    m = np.asarray(draw(shape, seed, is_complex=is_complex) * np.float32(size))
    s = np.abs(draw(shape, seed + 1)) ** 2 * np.float32(size) ** 2
    if zeros and s.size > 1:
        m, s = np.copy(m), np.copy(s)
        m.flat[0], s.flat[0] = 0, 0
    wide, m_wide = np.asarray(s, np.float64), m.astype(np.complex128 if is_complex else np.float64)
    given_arrays = jnp.asarray(m), jnp.asarray(s)
    root_free = divide(m_wide, wide + damping * np.mean(wide))
    length = rms(divide(m_wide, np.sqrt(wide))) / rms(root_free)
    root_free *= min(length, 2.5 / np.max(np.abs(root_free)))
    close(root_free_step(*given_arrays, damping=damping), root_free)
    newton = divide(m_wide, 8 * (wide + damping * np.mean(wide)) + 0.5 * size**2)
    close(newton_step(*given_arrays, damping=damping, absolute_damping=0.5 * size**2, batch_size=8), newton)
    close(adam_step(*given_arrays, eps=damping), divide(m_wide, np.sqrt(wide) + damping * np.sqrt(np.mean(wide))))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(shape=st.sampled_from(SHAPES), samples=st.sampled_from([0, 3]), is_complex=st.booleans())
def test_the_average_of_squares_starts_right_and_skips_zeros(shape, samples, is_complex):
    s, expected = jnp.zeros(shape), np.zeros(shape)
    for t in range(1, 7):
        c = np.array(draw((*[samples] * bool(samples), *shape), t, is_complex=is_complex))
        if t in (1, 4) and shape:
            c[..., 0] = 0
        square = np.abs(c.astype(np.complex128)) ** 2
        square = square.mean(0) if samples else square
        average = np.where(expected == 0, square, expected + max(0.3, 1 / t) * (square - expected))
        expected = np.where(square == 0, expected, average)
        s = average_square(s, jnp.asarray(c), weight=0.3, count=jnp.int32(t))
    close(s, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_entry_keeps_its_average(bad):
    s = jnp.asarray([1.0, 2.0])
    new = average_square(s, jnp.asarray([bad, 1.0]), weight=0.5, count=jnp.int32(9))
    np.testing.assert_array_equal(new, [1.0, 1.5])


def test_zeros_make_a_step_of_zero():
    zero = jnp.zeros(3)
    for damping in (0.0, 0.1):
        np.testing.assert_array_equal(root_free_step(zero, zero, damping=damping), zero)
        np.testing.assert_array_equal(adam_step(zero, zero, eps=damping), zero)
        step = newton_step(zero, zero, damping=damping, absolute_damping=0.0, batch_size=1)
        np.testing.assert_array_equal(step, zero)
    relative, mean = damp_relatively(zero, damping=0.1)
    np.testing.assert_array_equal(relative, jnp.ones(3))
    assert mean == 0


def test_a_gradient_is_limited_to_what_has_a_square():
    largest = 2.0**50
    huge = jnp.asarray([1.0, -1e20, 3e38, jnp.inf, -jnp.inf, jnp.nan, 0.0, -largest])
    limited = limit_to_squares(huge)
    np.testing.assert_array_equal(limited, [1.0, -largest, largest, np.inf, -np.inf, np.nan, 0.0, -largest])
    turned = limit_to_squares(jnp.asarray([3e20 + 4e20j, 1j]))
    np.testing.assert_allclose(turned, [largest * (0.6 + 0.8j), 1j], rtol=1e-6)
    for dtype in (jnp.bfloat16, jnp.float16):
        kept = jnp.asarray([1.0, -1e4], dtype)
        np.testing.assert_array_equal(limit_to_squares(kept), kept)


def test_an_undamped_step_of_huge_gradients_is_at_its_bound():
    """The quotient m / s is 1e24 beside an entry of which s knows little: its square is no float32."""
    m, s = jnp.asarray([1e12, 1e15, 3e14]), jnp.asarray([1e-12, 1e30, 1e28])
    found = np.float64(root_free_step(m, s, damping=0.0))
    np.testing.assert_allclose(found, [0, 2.5 / 30, 2.5], rtol=1e-2)


def test_few_entries_beside_tiny_ones_make_no_long_step():
    """Adam's step is as long for the tiny ones. One entry moved by 29 times Adam's step."""
    rng = np.random.default_rng(0)
    m = np.float32(1e-7 * rng.standard_normal((64, 64)))
    m[3, 5] = 1
    found = np.float64(root_free_step(jnp.asarray(m), jnp.square(jnp.asarray(m)), damping=0.1))
    np.testing.assert_allclose(found[3, 5], 2.5, rtol=1e-5)
    assert np.abs(np.delete(found.ravel(), 3 * 64 + 5)).max() < 0.1


def test_gradients_whose_squares_vanish_make_no_long_step():
    """Beside others whose squares do not: those are what ε and the root-free step's length are relative to."""
    for size in (1e-22, 3e-20, 1e-19, 3e-19, 1e-18, 1e-15):
        m = size * jnp.asarray([0.1, 1.0, 3.0])
        found = adam_step(m, jnp.square(m), eps=1e-8)
        assert np.all(np.abs(found) <= 1), size
        root_free = root_free_step(m, jnp.square(m), damping=0.1)
        assert rms(root_free) <= 1.001, size
    np.testing.assert_allclose(found, 1, rtol=0.02)
    np.testing.assert_allclose(rms(root_free), 1, rtol=1e-3)

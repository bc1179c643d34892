"""Rounding: dithered to fewer bits, and saturated to a smaller range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_optax._src.numerics.arithmetic import round_dithered, saturate, truncate


@given(
    value=st.floats(2.0**-10, 2.0**10, width=32),
    sign=st.sampled_from([-1, 1]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_dithered_rounding_is_right_on_average(value, sign, dtype):
    value *= sign
    counts = jnp.arange(64, dtype=jnp.int32)
    rounded = np.asarray(jax.vmap(lambda c: round_dithered(jnp.float32(value), dtype, c))(counts))
    unit = 2.0 ** np.floor(np.log2(abs(value))) * float(jnp.finfo(dtype).eps)
    assert np.abs(rounded.astype(np.float64) - value).max() <= unit * (1 + 1e-3)
    assert abs(rounded.astype(np.float64).mean() - value) <= 0.05 * unit


@pytest.mark.parametrize("value", [4.1e-5, -1e-6, 2.3e-8])
def test_below_the_normal_numbers_dithered_rounding_is_right_on_average(value):
    """The subnormal numbers of float16 are multiples of 2⁻²⁴, so that more digits are dropped than of normal ones."""
    counts = jnp.arange(1000, dtype=jnp.int32)
    rounded = jax.vmap(lambda count: round_dithered(jnp.float32(value), jnp.float16, count))(counts)
    np.testing.assert_allclose(np.float64(rounded).mean(), value, atol=2e-3 * 2.0**-24)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dithered_rounding_leaves_representable_values_alone(dtype):
    """For every offset: the largest and the smallest are among those of the first hundred thousand counts."""
    counts = jnp.arange(100_000, dtype=jnp.int32)
    values = jnp.array([0.0, 1.0, -1.0, 1.9921875, 2.0**-12, 3 * 2.0**-24], dtype)
    rounded = jax.vmap(lambda c: round_dithered(values.astype(jnp.float32), dtype, c))(counts)
    np.testing.assert_array_equal(rounded, jnp.broadcast_to(values, rounded.shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_nan_stays_nan_for_all_its_bits(bits, dtype):
    """The first are the bits of NaN on a CPU, the second on an NVIDIA GPU."""
    value = jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
    assert all(np.isnan(np.float32(round_dithered(value, dtype, count))) for count in jnp.arange(5))


@pytest.mark.parametrize("value", [np.inf, -np.inf, -3.4e38, 98304.0, 1.0, np.nan])
def test_saturation(value):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert saturate(jnp.ones((), dtype), jnp.float32) == 1
        limit = float(jnp.finfo(dtype).max)
        expected = np.clip(np.float32(value), -limit, limit)
        np.testing.assert_array_equal(np.float32(saturate(jnp.float32(value), dtype)), np.float32(expected))


def test_an_average_in_float16_decays_to_zero():
    """Rounded to nearest, 0.9 times five of the smallest numbers is five of them again."""
    average = jnp.array([1.0, -1.0, 5 * 2.0**-24, -6e4, np.inf, 0.0], jnp.float16)
    first = truncate(0.9 * average.astype(jnp.float32), jnp.float16)
    np.testing.assert_array_equal(
        np.float32(first), np.float32([0.89990234, -0.89990234, 4 * 2.0**-24, -53984, 65504, 0])
    )
    last = jax.lax.fori_loop(0, 400, lambda _, a: truncate(0.9 * a.astype(jnp.float32), jnp.float16), average)
    np.testing.assert_array_equal(np.float32(last), 0)


def test_no_dither_without_fewer_bits():
    value = jnp.float32(1 / 3)
    assert all(round_dithered(value, jnp.float32, c) == value for c in jnp.arange(5))

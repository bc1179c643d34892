"""The mathematics of one array: rounding, weights of moving averages, guards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_optax import diagonal_update


@given(
    value=st.floats(2.0**-10, 2.0**10, width=32),
    sign=st.sampled_from([-1, 1]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_dithered_rounding_is_right_on_average(value, sign, dtype):
    value *= sign
    counts = jnp.arange(64, dtype=jnp.int32)
    rounded = np.asarray(jax.vmap(lambda c: diagonal_update.round_dithered(jnp.float32(value), dtype, c))(counts))
    unit = 2.0 ** np.floor(np.log2(abs(value))) * float(jnp.finfo(dtype).eps)
    assert np.abs(rounded.astype(np.float64) - value).max() <= unit * (1 + 1e-3)
    assert abs(rounded.astype(np.float64).mean() - value) <= 0.05 * unit


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dithered_rounding_leaves_representable_values_alone(dtype):
    """Whatever the offset: the counts with the largest and the smallest are among the first hundred thousand."""
    counts = jnp.arange(100_000, dtype=jnp.int32)
    values = jnp.array([0.0, 1.0, -1.0, 1.9921875, 2.0**-12], dtype)
    rounded = jax.vmap(lambda c: diagonal_update.round_dithered(values.astype(jnp.float32), dtype, c))(counts)
    np.testing.assert_array_equal(rounded, jnp.broadcast_to(values, rounded.shape))


def test_no_dither_where_the_dtype_is_not_narrower():
    value = jnp.float32(1 / 3)
    assert all(diagonal_update.round_dithered(value, jnp.float32, c) == value for c in jnp.arange(5))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_total_weight_keeps_its_digits(decay, count):
    weight = diagonal_update.total_weight(decay, jnp.int32(count))
    assert float(weight) == pytest.approx(1 - decay**count, rel=1e-6)


def test_overflowing_curvature_leaves_its_entry_alone():
    s = jnp.array([2.0, 3.0, 4.0, 5.0])
    gradient = jnp.array([1.0, 1e20, jnp.nan, jnp.inf])
    new = diagonal_update.second_moment(s, gradient, decay=0.5, batch_size=2.0, count=jnp.int32(0))
    np.testing.assert_array_equal(new, [2.0, 3.0, 4.0, 5.0])
    moment = diagonal_update.first_moment(s, gradient, decay=0.5)
    np.testing.assert_allclose(moment, [1.5, 5e19, 4.0, 5.0])
    direction = diagonal_update.averaged_direction(gradient, moment, new, damping=0.0)
    np.testing.assert_array_equal(np.isfinite(direction), [True, True, False, False])


def test_half_precision_gradients_are_squared_in_single_precision():
    """300² overflows float16 and 10⁻³·10⁻³·10⁻³ underflows it."""
    gradient = jnp.array([300.0, 1e-3], jnp.float16)
    s = diagonal_update.second_moment(jnp.zeros(2), gradient, decay=0.999, batch_size=1.0, count=jnp.int32(0))
    np.testing.assert_allclose(s, 1e-3 * np.float64(gradient) ** 2, rtol=1e-5)

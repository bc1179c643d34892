"""The mathematics of one array: weights of moving averages, guards, half precision."""

import jax.numpy as jnp
import numpy as np
import pytest

from rootfree_optax._src.blocks import diagonal as diagonal_update
from rootfree_optax._src.blocks.momentum import total_weight


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_total_weight_keeps_its_digits(decay, count):
    weight = total_weight(decay, jnp.int32(count))
    assert float(weight) == pytest.approx(1 - decay**count, rel=1e-6)


def test_what_is_not_finite_leaves_its_entry_alone_and_what_overflows_counts_as_the_largest():
    s = jnp.array([2.0, 3.0, 4.0, 5.0])
    gradient = jnp.array([1.0, 1e20, jnp.nan, jnp.inf])
    new = diagonal_update.second_moment(s, gradient, decay=0.5, batch_size=2.0, count=jnp.int32(0))
    np.testing.assert_array_equal(new, [2.0, np.finfo(np.float32).max, 4.0, 5.0])
    direction = diagonal_update.root_free_direction(gradient, new, damping=0.0)
    np.testing.assert_array_equal(np.isfinite(direction), [True, True, False, False])


def test_non_finite_gradient_shows_in_the_first_moment_for_one_step():
    """In the average, and never in m: those entries keep their old value."""
    m = jnp.array([2.0, 3.0, 4.0])
    shown, m = diagonal_update.first_moment(m, jnp.array([1.0, jnp.nan, jnp.inf]), decay=0.5)
    np.testing.assert_array_equal(np.isfinite(shown), [True, False, False])
    direction = diagonal_update.averaged_direction(jnp.ones(3), shown, jnp.ones(3), damping=0.0)
    np.testing.assert_array_equal(np.isfinite(direction), [True, False, False])
    np.testing.assert_array_equal(m, [1.5, 3.0, 4.0])
    average, m = diagonal_update.first_moment(m, jnp.ones(3), decay=0.5)
    np.testing.assert_array_equal(average, [1.25, 2.0, 2.5])
    np.testing.assert_array_equal(m, average)


def test_half_precision_gradients_are_squared_in_single_precision():
    """300² overflows float16 and 10⁻³·10⁻³·10⁻³ underflows it."""
    gradient = jnp.array([300.0, 1e-3], jnp.float16)
    s = diagonal_update.second_moment(jnp.zeros(2), gradient, decay=0.999, batch_size=1.0, count=jnp.int32(0))
    np.testing.assert_allclose(s, 1e-3 * np.float64(gradient) ** 2, rtol=1e-5)

"""Tests for finite entries of trees."""

import jax.numpy as jnp
import pytest

from rootfree_optax._src.numerics.arithmetic import all_finite

GOOD = jnp.ones(3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_entry_of_any_array_decides(bad):
    one_bad = GOOD.at[1].set(bad)
    assert all_finite((GOOD, GOOD))
    assert not all_finite((one_bad, GOOD))
    assert not all_finite((GOOD, one_bad))

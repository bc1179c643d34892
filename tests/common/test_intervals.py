"""The growing interval against a replay of its rule, step by step."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rootfree_optax as rf

STEPS = 20_000


def replay(maximum, base):
    """Returns the steps that refresh: after step k the next is min(max(⌊log_base(k + 1)⌋, 1), maximum) steps later."""
    due, step, base = [], 0, fractions.Fraction(base)
    while step < STEPS:
        due.append(step)
        power, logarithm = base, 0  # base^(logarithm + 1)
        while power <= step + 1:
            power, logarithm = power * base, logarithm + 1
        step += min(max(logarithm, 1), maximum)
    return due


@pytest.mark.parametrize(
    ("maximum", "base"), [(1, 4.0), (2, 4.0), (5, 4.0), (10, 4.0), (100, 4.0), (3, 2.0), (12, 2.0), (20, 1.5), (4, 100)]
)
def test_refreshes_when_the_rule_says(maximum, base):
    due = jax.vmap(rf.growing_interval(maximum, base=base))(jnp.arange(STEPS))
    assert due.dtype == jnp.bool_
    np.testing.assert_array_equal(np.flatnonzero(due), replay(maximum, base))


def test_the_last_counts_do_not_overflow():
    """Half of all steps at an interval of two, whatever the count; the count saturates at its largest."""
    last = np.iinfo(np.int32).max
    counts = jnp.arange(10, dtype=jnp.int32) + jnp.int32(last - 9)
    for maximum in (1, 2, 5):
        due = jax.vmap(rf.growing_interval(maximum))(counts)
        assert int(due.sum()) == 10 // maximum


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maximum": 0}, "maximum must be at least one, got 0"),
        ({"maximum": 3, "base": 1.0}, r"base must be greater than one, got 1\.0"),
        ({"maximum": 3, "base": float("nan")}, "base must be greater than one, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rf.growing_interval(**arguments)

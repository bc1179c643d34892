"""The growing interval against a replay of its rule, step by step."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rootfree_optax as rf
from rootfree_optax._src.common.schedules import complement, is_due

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
    due = jax.vmap(rf.growing(maximum, base=base))(jnp.arange(STEPS))
    assert due.dtype == jnp.bool_
    np.testing.assert_array_equal(np.flatnonzero(due), replay(maximum, base))


def test_the_last_counts_do_not_overflow():
    """Half of all steps at an interval of two, whatever the count; the count saturates at its largest."""
    last = np.iinfo(np.int32).max
    counts = jnp.arange(10, dtype=jnp.int32) + jnp.int32(last - 9)
    for maximum in (1, 2, 5):
        due = jax.vmap(rf.growing(maximum))(counts)
        assert int(due.sum()) == 10 // maximum


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maximum": 0}, "maximum must be a whole number of at least 1, as a Python int, got 0"),
        ({"maximum": 3, "base": 1.0}, r"base must be finite and above 1, got 1\.0"),
        ({"maximum": 3, "base": float("nan")}, "base must be finite and above 1, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rf.growing(**arguments)


@pytest.mark.parametrize("period", [0, -3, 2.0, True, "2"])
def test_a_period_that_is_not_a_whole_number_is_refused(period):
    with pytest.raises(ValueError, match=f"period must be a whole number of at least 1, .* got {period!r}"):
        rf.staggered(period)


def test_what_is_due_at_a_step():
    """Of a number, an array, a callable of whether or of an interval; True itself where it is every step."""
    at = lambda interval: [bool(is_due(interval, jnp.int32(count))) for count in range(6)]
    every_third = [True, False, False] * 2
    assert is_due(1, jnp.int32(5)) is True
    assert at(3) == every_third
    assert at(jnp.int32(3)) == every_third
    assert at(jnp.float32(3)) == every_third
    assert at(lambda count: count % 3 == 0) == every_third
    assert at(lambda count: jnp.int32(3)) == every_third
    assert at(jnp.asarray(True)) == [True] * 6
    assert is_due(rf.staggered(3), jnp.int32(1)) == rf.staggered(3)


@pytest.mark.parametrize("every", [4, 4.0, np.int64(4), jnp.int32(4), jnp.float32(4)])
def test_every_spelling_of_an_interval_has_one_weight(every):
    np.testing.assert_allclose(complement(0.95, every), 1 - 0.95**4, rtol=1e-6)
    np.testing.assert_allclose(complement(lambda count: 0.9, every)(0), 1 - 0.9**4, rtol=1e-6)


@pytest.mark.parametrize("every", [rf.growing(10), jnp.bool_(True)])
def test_what_says_when_counts_as_every_step(every):
    np.testing.assert_allclose(complement(0.95, every), 0.05, rtol=1e-6)

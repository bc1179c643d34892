"""The inverse root by products, against eigenvalues in float64, and its polynomials."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision

from rootfree_optax._src.numerics.inverse_root import (
    LARGEST_CONDITION,
    best_polynomials,
    elementwise,
    factorize,
    inverse_root_table,
    times_inverse_root,
)

SHIFT = 0.9
# The largest relative error at each condition number. A bound on the spectrum that is too large costs accuracy as a
# condition number does that is too large by the same factor.
ERRORS = {
    "float32": {1: 1e-6, 3: 1e-6, 10: 3e-6, 30: 2e-4, 100: 6e-3, 500: 0.15},
    "bfloat16": {1: 1e-6, 3: 4e-3, 10: 1e-2, 30: 2e-2, 100: 5e-2, 500: 0.25},
}
root = jax.jit(times_inverse_root)


def excess_of(rng, spectrum, d, condition):
    """Returns E with ‖E‖ = (κ − 1)·a, of rank one, of an eighth of the full rank, or with every eigenvalue."""
    values = {
        "one": np.eye(d)[0],
        "few": np.where(np.arange(d) < max(1, d // 8), np.linspace(1, 0.1, d), 0),
        "all": np.geomspace(1, 1e-3, d),
    }[spectrum]
    vectors = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (vectors * values * (condition - 1) * SHIFT) @ vectors.T


def exact_root(excess):
    values, vectors = np.linalg.eigh(excess)
    return (vectors * np.sqrt(SHIFT + np.maximum(values, 0))) @ vectors.T


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("spectrum", ["one", "few", "all"])
def test_error_by_condition_number(spectrum, dtype):
    rng = np.random.default_rng(0)
    for d in (1, 8, 96):
        k = np.asarray(jnp.asarray(np.eye(d) + 0.3 * rng.standard_normal((d, d)) / np.sqrt(d), dtype), np.float64)
        excesses = np.stack([excess_of(rng, spectrum, d, condition) for condition in ERRORS[dtype]])
        stack = jnp.broadcast_to(jnp.asarray(k, dtype), excesses.shape)
        found = np.asarray(root(stack, jnp.asarray(excesses, jnp.float32), shift=SHIFT), np.float64)
        for result, excess, bound in zip(found, excesses, ERRORS[dtype].values(), strict=True):
            error = np.linalg.solve(k, result) @ exact_root(excess) - np.eye(d)
            assert np.linalg.norm(error, 2) < bound * np.linalg.cond(k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spectrum_beyond_the_bound_is_shrunk_to_it(dtype):
    """K shrinks along the large directions by a bounded factor, and along the others as without them."""
    d = 32
    for size in (1e4, 1e12, 1e30):
        excess = jnp.zeros((d, d)).at[0, 0].set(size).at[1, 2].set(1e-3 * size).at[2, 1].set(1e-3 * size)
        excess = excess.at[1, 1].set(size).at[2, 2].set(size)
        result = np.asarray(root(jnp.eye(d, dtype=dtype), excess, shift=SHIFT))
        values = np.linalg.eigvalsh((result + result.T) / 2)
        assert np.all(values[:3] > 0.9 * (SHIFT * LARGEST_CONDITION) ** -0.5)
        assert np.all(values[:3] < 2 * (SHIFT * LARGEST_CONDITION) ** -0.5)
        np.testing.assert_allclose(values[3:], SHIFT**-0.5, rtol=0.1)


def test_half_precision_costs_no_accuracy_where_the_excess_vanishes():
    excess = jnp.zeros((64, 64)).at[:8, :8].set(2.0)
    result = root(jnp.eye(64, dtype=jnp.bfloat16), excess, shift=SHIFT)
    np.testing.assert_allclose(np.diag(result)[8:], SHIFT**-0.5, rtol=2e-5)


def test_a_non_finite_excess_gives_a_non_finite_result():
    for excess in (jnp.full((4, 4), jnp.inf), jnp.eye(4).at[0, 1].set(jnp.nan)):
        assert not np.isfinite(root(jnp.eye(4), excess, shift=SHIFT)).all()
    assert np.isnan(elementwise(jnp.ones(2), jnp.array([0.0, jnp.inf]), shift=SHIFT)).tolist() == [False, True]


def test_a_diagonal_that_has_lost_its_digits_counts_as_their_resolution():
    excess = jnp.float32(SHIFT) * jnp.array([-1.0, -1.0 - 1e-7, 0.0])
    resolution = (SHIFT * np.finfo(np.float32).eps) ** -0.5
    found = elementwise(jnp.ones(3), excess, shift=SHIFT)
    np.testing.assert_allclose(found, [resolution, resolution, SHIFT**-0.5], rtol=1e-5)


def test_double_precision():
    with double_precision():
        excess = excess_of(np.random.default_rng(1), "all", 6, 3.0)
        result = np.asarray(jax.jit(times_inverse_root)(np.eye(6), excess, shift=SHIFT))
        np.testing.assert_allclose(result @ exact_root(excess), np.eye(6), atol=1e-11)


def test_the_polynomials_err_more_the_wider_the_spectrum_and_no_more_than_told():
    table, errors = inverse_root_table(), []
    assert table.conditions[-1] == LARGEST_CONDITION
    for row, condition in enumerate(table.conditions):
        start = t = np.geomspace(1 / condition, 1, 2000)
        product = np.ones_like(t)
        for lead, *quadratics in table.polynomials[:, :, row]:
            q = lead * np.prod([t**2 + a * t + b for a, b in np.reshape(quadratics, (2, 2))], axis=0)
            t, product = t * q**2, product * q
        errors.append(np.abs(1 - np.sqrt(start) * product).max())
    assert np.diff(errors).min() > -1e-13
    by_condition = dict(zip(table.conditions.round(1), errors, strict=True))
    assert by_condition[32.0] < 7e-6
    assert by_condition[90.5] < 5e-4
    assert by_condition[1024.0] < 6.3e-2


def test_a_polynomial_with_real_roots_is_not_factorized():
    np.testing.assert_allclose(factorize(np.array([[2.0, -2.0, 1.0], [15.0, 6.0, 3.0]])), [[1, -2, 2], [3, 2, 5]])
    with pytest.raises(ValueError, match="without real roots"):
        factorize(np.array([[2.0, -2.0, 1.0], [2.0, -3.0, 1.0]]))


@pytest.mark.parametrize("degree", [1, 4])
def test_a_polynomial_is_the_best_because_its_error_alternates(degree):
    """By Chebyshev's theorem: no other polynomial of that degree has a smaller largest error."""
    low, high = np.array([0.01, 0.25]), np.array([1.0, 2.25])
    for a, b, coefficients, least in zip(low, high, *best_polynomials(low, high, degree), strict=True):
        t = np.linspace(np.sqrt(a), np.sqrt(b), 200_001) ** 2
        error = 1 - np.sqrt(t) * np.polynomial.polynomial.polyval(t, coefficients)
        runs = np.split(error, np.flatnonzero(np.diff(np.sign(error))) + 1)
        assert len(runs) == degree + 2
        np.testing.assert_allclose([np.abs(run).max() for run in runs], least, rtol=1e-4)

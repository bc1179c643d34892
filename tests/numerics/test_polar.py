"""Polar factors and square roots by products, against singular values and eigenvalues in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import in_contract
from double_precision import double_precision

from rootfree_optax._src.numerics import arithmetic, polar
from rootfree_optax._src.numerics.polar import orthogonalize, positive_root, symmetric_root

CONDITIONS = (1, 1e2, 1e4, 1e6)  # of A = K Kᵀ
ERRORS = {"float32": 1e-5, "float64": 1e-6}
ROOT_ERRORS = {1: 1e-6, 10: 1e-5, 30: 2e-5, 100: 1e-3, 1000: 7e-2}  # of M^(1/2), by the condition number of M


def orthogonal(rng, d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def problems(d, conditions, scale=1.0):
    """Returns the eigenvectors and eigenvalues of each A, and a K with K Kᵀ = A that is not symmetric."""
    rng = np.random.default_rng(d)
    vectors = np.stack([orthogonal(rng, d) for _ in conditions])
    values = np.stack([scale * np.geomspace(1, 1 / condition, d) for condition in conditions])
    rotations = np.stack([orthogonal(rng, d) for _ in conditions])
    return vectors, values, (vectors * np.sqrt(values)[:, None]) @ rotations


def power(vectors, values, exponent):
    return (vectors * values[:, None] ** exponent) @ np.matrix_transpose(vectors)


def errors(found, expected):
    """Returns the error of each matrix relative to the expected one, both in the operator norm."""
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - expected, 2, axis=(1, 2)) / np.linalg.norm(expected, 2, axis=(1, 2))


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_symmetric_root(d, dtype):
    """The root R of A has R Rᵀ = A."""
    vectors, values, factors = problems(d, CONDITIONS)
    with double_precision():
        half = jax.jit(symmetric_root)(jnp.asarray(factors, dtype))
    assert half.dtype == dtype
    np.testing.assert_array_equal(half, np.matrix_transpose(half))
    assert errors(half, power(vectors, values, 1 / 2)).max() < ERRORS[dtype]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("d", [1, 7, *[in_contract(d) for d in (2, 64)]])
def test_positive_root(d, dtype):
    """Every eigenvalue has the relative error, not the largest alone; a bound that is too low costs as a condition."""
    vectors, values, _ = problems(d, list(ROOT_ERRORS))
    for low in (1, 3):
        with double_precision():
            matrices = jnp.asarray(power(vectors, values, 1), dtype)
            found = jax.jit(jax.vmap(positive_root))(matrices, jnp.asarray(values.min(1) / low, dtype))
        np.testing.assert_allclose(found, np.matrix_transpose(found), rtol=0, atol=1e-6)
        roots = values**-0.25
        relative = roots[:, :, None] * (np.matrix_transpose(vectors) @ np.float64(found) @ vectors) * roots[:, None]
        error = np.linalg.norm(relative - np.eye(d), 2, axis=(1, 2))
        # The bound on ‖M‖₂ is at most d^(1/4) times too large, and counts in the condition, too.
        for condition, found_error in zip(ROOT_ERRORS, error, strict=True):
            bound = min((e for c, e in ROOT_ERRORS.items() if c >= condition * low * d**0.25), default=0.4)
            assert found_error < bound, (condition, low)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_roots_of_any_scale_and_condition_are_finite(scale):
    """Also of singular matrices, and where rounding makes eigenvalues negative."""
    vectors, values, factors = problems(24, (1e2, 1e8, 1e14), scale)
    found = jax.jit(symmetric_root)(jnp.asarray(factors, jnp.float32))
    assert errors(found, power(vectors, values, 1 / 2)).max() < 1e-3
    values[-1, 5:] = 0
    found = jax.jit(positive_root)(jnp.asarray(power(vectors, values, 1), jnp.float32), scale / 500)
    assert errors(found, power(vectors, values, 1 / 2)).max() < 5e-2


def test_small_eigenvalues_of_the_symmetric_root_are_accurate_too():
    vectors, values, factors = problems(64, (1e6,))
    found = np.asarray(jax.jit(symmetric_root)(jnp.asarray(factors, jnp.float32)), np.float64)
    halves = values[0] ** -0.25
    relative = halves[:, None] * (vectors[0].T @ found[0] @ vectors[0]) * halves
    assert np.linalg.norm(relative - np.eye(64), 2) < 1e-3


def test_the_symmetric_root_of_a_factor_in_half_precision_is_in_float32():
    factors = problems(16, (1e2,))[-1]
    factor = jnp.asarray(factors, jnp.bfloat16)
    left, singular, _ = np.linalg.svd(np.float64(factor))
    found = symmetric_root(factor)
    assert found.dtype == jnp.float32
    assert errors(found, (left * singular[:, None]) @ np.matrix_transpose(left)).max() < 1e-5


@pytest.mark.parametrize(("bits", "bound"), [(10, 4e-3), (7, 3e-2)])
def test_symmetric_root_from_products_of_few_bits(bits, bound, monkeypatch):
    """As of TF32 and bfloat16 units, which CPUs do not have."""

    def rounded(array):
        drop = 23 - bits
        pattern = jax.lax.bitcast_convert_type(array, jnp.uint32)
        pattern = ((pattern + jnp.uint32(1 << (drop - 1))) >> drop) << drop
        return jax.lax.bitcast_convert_type(pattern, jnp.float32)

    exact = arithmetic.einsum
    of_few_bits = lambda subscripts, *operands, **options: exact(subscripts, *map(rounded, operands), **options)
    monkeypatch.setattr(arithmetic, "einsum", of_few_bits)
    monkeypatch.setattr(polar, "einsum", of_few_bits)
    vectors, values, factors = problems(64, CONDITIONS)
    found = jax.jit(lambda factor: symmetric_root(factor))(jnp.asarray(factors, jnp.float32))
    largest = errors(found, power(vectors, values, 1 / 2)).max()
    assert 1e-4 < largest < bound


@pytest.mark.parametrize("function", [orthogonalize, symmetric_root, lambda matrix: positive_root(matrix, 1e-2)])
def test_zero_stays_zero_and_non_finite_entries_show(function):
    matrices = jnp.stack([jnp.zeros((3, 3)), jnp.eye(3).at[1, 2].set(jnp.nan), jnp.eye(3).at[0, 0].set(jnp.inf)])
    zero, nan, infinite = jax.jit(function)(matrices)
    np.testing.assert_array_equal(zero, np.zeros((3, 3)))
    assert not np.isfinite(nan).all()
    assert not np.isfinite(infinite).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (8, 8), (12, 40), (40, 12)])
def test_orthogonalized_singular_values_are_near_one(shape, scale):
    rng = np.random.default_rng(0)
    short = min(shape)
    left, right = (np.stack([orthogonal(rng, d)[:, :short] for _ in range(2)]) for d in shape)
    values = np.geomspace(1, 2e-3 * np.sqrt(short), short)
    matrix = jnp.asarray(scale * (left * values) @ np.matrix_transpose(right), jnp.float32)
    found = np.asarray(jax.jit(orthogonalize)(matrix), np.float64)
    inner = np.matrix_transpose(left) @ found @ right
    assert np.all(np.linalg.svd(inner, compute_uv=False) < 1.21)
    assert np.all(np.linalg.svd(inner, compute_uv=False) > 0.68)
    np.testing.assert_allclose(inner * (1 - np.eye(short)), 0, atol=1e-3)
    np.testing.assert_allclose(found, left @ inner @ np.matrix_transpose(right), atol=1e-5)


def test_orthogonalize_iterates_muons_polynomial():
    x = np.random.default_rng(0).standard_normal((3, 5))
    expected = x / np.linalg.norm(x)
    for _ in range(5):
        gram = expected @ expected.T
        expected = (3.4445 * np.eye(3) - 4.7750 * gram + 2.0315 * gram @ gram) @ expected
    with double_precision():
        found = orthogonalize(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_orthogonalize_multiplies_the_smaller_gram_matrix(shape):
    jaxpr = jax.make_jaxpr(orthogonalize)(jnp.ones(shape))
    [loop] = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    products = [equation for equation in loop.params["jaxpr"].eqns if equation.primitive.name == "dot_general"]
    assert sorted(equation.outvars[0].aval.shape for equation in products) == sorted([(4, 4), (4, 4), shape])

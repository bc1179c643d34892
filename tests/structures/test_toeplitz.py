"""What is particular to Toeplitz structures: long transforms, and the two mirror images."""

import jax
import jax.numpy as jnp
import numpy as np

from rootfree_optax._src.structures.toeplitz import TriangularToeplitz


def test_float32_is_accurate_for_many_rows():
    dim = 768
    structure = TriangularToeplitz(dim, lower=True)
    rng = np.random.default_rng(0)
    c = rng.standard_normal(dim).astype(np.float32) / dim
    c[0] = 1
    x = rng.standard_normal((dim, 64)).astype(np.float32)
    outer, inner, applied = jax.jit(
        lambda c, x: (structure.project_outer(x, 0), structure.project_inner((c,)), structure.apply((c,), x, 0))
    )(c, x)

    i, j = np.indices((dim, dim))
    matrix = np.where(i >= j, c.astype(np.float64)[abs(i - j)], 0)
    x = x.astype(np.float64)

    def projection(symmetric):
        sums = np.array([np.trace(symmetric, offset=-k) for k in range(dim)])
        return sums / np.arange(dim, 0, -1) * np.where(np.arange(dim) == 0, 1, 2)

    for got, expected in (
        (outer[0], projection(x @ x.T)),
        (inner[0], projection(matrix.T @ matrix)),
        (applied, matrix @ x),
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_a_projection_of_an_outer_product_has_a_non_negative_trace():
    structure = TriangularToeplitz(50, lower=False)
    tensor = jnp.asarray(1e-15 * np.random.default_rng(0).standard_normal((50, 3)), jnp.float32)
    (diagonals,) = structure.project_outer(tensor, 0)
    assert diagonals[0] > 0


def test_the_two_kinds_are_mirror_images():
    lower, upper = (TriangularToeplitz(6, lower=lower) for lower in (True, False))
    parts = (jnp.arange(1.0, 7.0),)
    tensor = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6)), jnp.float32)
    np.testing.assert_array_equal(upper.to_dense(parts), lower.to_dense(parts)[::-1, ::-1])
    np.testing.assert_allclose(
        upper.apply(parts, tensor, 1), lower.apply(parts, tensor[:, ::-1], 1)[:, ::-1], rtol=1e-5, atol=1e-5
    )

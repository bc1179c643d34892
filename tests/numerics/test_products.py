"""Products of low-precision arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision

from rootfree_optax._src.numerics.arithmetic import einsum, matmul


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_of_half_precision_accumulate_in_float32(dtype):
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.standard_normal((2, 64, 64)), dtype) for _ in range(2))
    expected = np.float64(left) @ np.float64(right)
    found = jax.jit(matmul, static_argnames="precision")(left, right, precision=None)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)  # rounded to `dtype`, it would err by 3e-2
    traced = jax.jit(lambda a, b: einsum("nij,nji->n", a, b, precision=None))(left, right)
    np.testing.assert_allclose(traced, np.trace(expected, axis1=1, axis2=2), atol=1e-4)


def test_products_of_double_precision_are_in_double_precision():
    with double_precision():
        matrix = np.random.default_rng(0).standard_normal((8, 8))
        found = matmul(jnp.asarray(matrix), jnp.asarray(matrix), precision=None)
        np.testing.assert_allclose(found, matrix @ matrix, atol=1e-14)

"""Patterns of blocks that have no name."""

import jax
import jax.numpy as jnp
import numpy as np

from rootfree_optax._src.structures.block_diagonal import BlockDiagonal
from rootfree_optax._src.structures.block_pattern import BlockPattern


def test_a_chain_of_couplings_is_closed_under_product():
    # Three segments, all coupled to all later ones: block upper-triangular, with a product by way of the middle one.
    pattern = BlockPattern(
        (BlockDiagonal(1, 2), BlockDiagonal(2, 2), BlockDiagonal(3, 1)), couplings=((0, 1), (0, 2), (1, 2))
    )
    rng = np.random.default_rng(0)
    left, right = (
        tuple(jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in pattern.part_shapes) for _ in range(2)
    )
    matrices = jax.jit(lambda *parts: [pattern.to_dense(p) for p in (*parts, pattern.matmul(*parts))])(left, right)
    left, right, product = map(np.asarray, matrices)
    np.testing.assert_array_equal(product, left @ right)

"""Patterns of blocks that have no name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootfree_optax._src.structures import BlockDiagonal, BlockPattern


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


@pytest.mark.parametrize(
    "couplings",
    [((0, 1), (1, 2)), ((0, 1), (1, 0)), ((1, 1),), ((0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1))],
    ids=["not transitive", "a pair and its mirror image", "a segment with itself", "a cycle"],
)
def test_couplings_that_are_not_closed_under_product_are_an_error(couplings):
    with pytest.raises(ValueError, match="transitive and without cycles"):
        BlockPattern((BlockDiagonal(1, 2), BlockDiagonal(1, 2), BlockDiagonal(1, 2)), couplings)


@pytest.mark.parametrize("couplings", [((0, 2),), ((-1, 0),), ((0, 1), (0, 1))])
def test_couplings_of_segments_that_do_not_exist_or_twice_are_an_error(couplings):
    with pytest.raises(ValueError, match="distinct pairs"):
        BlockPattern((BlockDiagonal(1, 2), BlockDiagonal(1, 2)), couplings)


@pytest.mark.parametrize("segments", [(), (BlockDiagonal(1, 3),)])
def test_a_pattern_of_fewer_than_two_segments_is_an_error(segments):
    with pytest.raises(ValueError, match="at least two segments"):
        BlockPattern(segments)


@pytest.mark.parametrize(("count", "size"), [(0, 3), (3, 0), (-1, -2)])
def test_no_blocks_or_empty_blocks_are_an_error(count, size):
    with pytest.raises(ValueError, match=f"at least one row, got {count} blocks of {size}"):
        BlockDiagonal(count, size)

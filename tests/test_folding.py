"""Short neighbouring axes folded into one, against float64 NumPy axis by axis."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kronecker_runs import draw, run, scale_by_exact, scale_by_published
from rootfree_optax._src.blocks.factor_step import outer_products
from rootfree_optax._src.blocks.folding import fold

import rootfree_optax as rf
from rootfree_optax._src.blocks.apply import precondition, precondition_by_squares
from rootfree_optax._src.structures import dense, diagonal

# Lengths, which of them are diagonal, and the groups that they fold into.
CASES = {
    "kernel": ((3, 3, 8, 12), (), ((0, 1), (2,), (3,))),
    "three": ((2, 1, 3, 40), (), ((0, 1, 2), (3,))),
    "in the middle": ((40, 2, 3), (), ((0,), (1, 2))),
    "a diagonal between": ((3, 3, 3, 40), (1,), ((0,), (1,), (2,), (3,))),
    "too long together": ((6, 6, 40), (), ((0,), (1,), (2,))),
    "long beside the rest": ((3, 4, 5), (), ((0,), (1,), (2,))),
    "matrix": ((4, 3), (), ((0,), (1,))),
}


def drawn(name, dtype):
    lengths, diagonals, _ = CASES[name]
    rng = np.random.default_rng(0)
    structures = [diagonal(d) if n in diagonals else dense(d) for n, d in enumerate(lengths)]
    parts = [rng.standard_normal(d if n in diagonals else (d, d)) for n, d in enumerate(lengths)]
    parts = [jnp.asarray(part, dtype) for part in parts]
    matrices = [np.diag(np.float64(p)) if p.ndim == 1 else np.float64(p) for p in parts]
    return structures, tuple((part,) for part in parts), matrices


def multiplied(tensor, matrices):
    for axis, matrix in enumerate(matrices, start=tensor.ndim - len(matrices)):
        tensor = np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)
    return tensor


@pytest.mark.parametrize("name", CASES)
def test_folds_short_dense_neighbours(name):
    structures, factors, _ = drawn(name, jnp.float32)
    assert fold(structures, factors).groups == CASES[name][2]


def test_matrices_of_a_narrow_range_or_of_two_dtypes_stay_apart():
    structures, factors, _ = drawn("kernel", jnp.float16)
    assert all(len(group) == 1 for group in fold(structures, factors).groups)
    structures, factors, _ = drawn("kernel", jnp.float32)
    mixed = ((factors[0][0].astype(jnp.bfloat16),), *factors[1:])
    assert all(len(group) == 1 for group in fold(structures, mixed).groups)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("samples", [(), (1,), (5,)])
@pytest.mark.parametrize("name", CASES)
def test_outer_products_are_those_of_each_axis(name, samples, dtype, tolerance):
    structures, factors, matrices = drawn(name, dtype)
    lengths = CASES[name][0]
    gradient = np.random.default_rng(1).standard_normal((*samples, *lengths))
    found = jax.jit(lambda g, k: outer_products(g, structures, k, batch_size=2.0))(np.float32(gradient), factors)
    x = multiplied(gradient, [matrix.T for matrix in matrices]).reshape(-1, *lengths) * np.sqrt(2)
    for n, (parts, d) in enumerate(zip(found, lengths, strict=True)):
        unfolding = np.moveaxis(x, n + 1, 0).reshape(d, -1)
        expected = unfolding @ unfolding.T / len(x) / (np.prod(lengths) / d)
        expected = np.diagonal(expected) if parts[0].ndim == 1 else expected
        np.testing.assert_allclose(parts[0], expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("name", CASES)
def test_directions_are_those_of_all_axes(name, dtype, tolerance):
    structures, factors, matrices = drawn(name, dtype)
    gradient = np.random.default_rng(1).standard_normal(CASES[name][0])
    expected = multiplied(gradient, [matrix @ matrix.T for matrix in matrices])
    found = precondition(jnp.float32(gradient), factors, structures=structures)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    squares = tuple(s.square(parts) for s, parts in zip(structures, factors, strict=True))
    if dtype == "float32":
        by_squares = precondition_by_squares(jnp.float32(gradient), squares, structures=structures)
        chex.assert_trees_all_close(by_squares, found, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("make", [scale_by_published, scale_by_exact])
@pytest.mark.parametrize(
    ("shape", "block_size"), [((5, 5), 4), ((5, 5, 4, 4), 4), ((2, 2), 1), ((3, 3, 9, 8), 8), ((9, 3, 8), 8)], ids=str
)
def test_pieces_of_length_one_beside_short_axes_keep_their_state(make, shape, block_size):
    """Their factor is a diagonal's: of another shape than what a mean over a folded matrix has by itself."""
    gradients = draw({"w": shape}, steps=3)
    tx = make(layout=rf.Layout(block_size=block_size), update_every=2, batch_size=4)
    directions, states = run(tx, gradients)  # a loop, which takes one type of state
    chex.assert_tree_all_finite((directions, states))
    # The block at the start is what a parameter of its own would be.
    size = tuple(min(length, block_size) for length in shape)
    corner = {"w": gradients["w"][(slice(None), *(slice(length) for length in size))]}
    if 1 not in size:
        alone, _ = run(make(update_every=2, batch_size=4), corner)
        block = directions["w"][(slice(None), *(slice(length) for length in size))]
        np.testing.assert_allclose(block, alone["w"], rtol=1e-4, atol=1e-5)

"""Stacks hold the blocks of one kind in order, and give them back."""

import jax.numpy as jnp
import numpy as np
import pytest

from rootfree_optax._src.layout import stack as stacks_of_blocks
from rootfree_optax._src.layout.stack import Placement, Stack, place, widest
from rootfree_optax._src.structures.names import block_diagonal, dense, diagonal


def parts() -> list[Stack]:
    square, vector = (dense(2), dense(2)), (diagonal(3),)
    return [
        Stack((2, 2), square, (None, None), 2),
        Stack((3,), vector, (None,), 1),
        Stack((2, 2), square, (None, None), 1),
        Stack((2, 2), (dense(2), diagonal(2)), (None, None), 4),
        Stack((3,), vector, (None,), 2),
    ]


def test_parts_of_one_kind_are_placed_behind_each_other() -> None:
    stacks, placements = place(parts())
    assert [(stack.shape, stack.count) for stack in stacks] == [((2, 2), 3), ((3,), 3), ((2, 2), 4)]
    assert placements == (
        Placement(0, 0, 2),
        Placement(1, 0, 1),
        Placement(0, 2, 1),
        Placement(2, 0, 4),
        Placement(1, 1, 2),
    )


def test_structures_that_are_the_same_matrices_share_a_stack() -> None:
    both = [Stack((4,), (dense(4),), (None,), 1), Stack((4,), (block_diagonal(30)(4),), (None,), 1)]
    assert [stack.count for stack in place(both)[0]] == [2]


def test_factors_of_another_dtype_have_a_stack_of_their_own() -> None:
    dtypes = [(None,), (jnp.dtype("bfloat16"),), (None,)]
    stacks, placements = place([Stack((4,), (dense(4),), dtype, 1) for dtype in dtypes])
    assert [(stack.factor_dtypes, stack.count) for stack in stacks] == [(dtypes[0], 2), (dtypes[1], 1)]
    assert placements == (Placement(0, 0, 1), Placement(1, 0, 1), Placement(0, 1, 1))


def test_unstack_undoes_stack() -> None:
    stacks, placements = place(parts())
    pieces = [np.full((part.count, *part.shape), i, np.float32) for i, part in enumerate(parts())]
    arrays = stacks_of_blocks.stack([jnp.asarray(piece) for piece in pieces], placements, stacks)
    assert [array.shape for array in arrays] == [(3, 2, 2), (3, 3), (4, 2, 2)]
    np.testing.assert_array_equal(arrays[0][:, 0, 0], [0, 0, 2])
    for piece, found in zip(pieces, stacks_of_blocks.unstack(arrays, placements), strict=True):
        np.testing.assert_array_equal(piece, found)


def test_pieces_without_values_are_minus_infinity_and_do_not_widen_the_dtype() -> None:
    stacks, placements = place(parts())
    pieces = [None if i in (1, 2, 3) else jnp.ones((p.count, *p.shape), jnp.bfloat16) for i, p in enumerate(parts())]
    squares, vectors, empty = stacks_of_blocks.stack(pieces, placements, stacks)
    assert (squares.dtype, vectors.dtype, empty.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(np.isneginf(squares[:, 0, 0]), [False, False, True])
    np.testing.assert_array_equal(np.isneginf(vectors[:, 0]), [True, False, False])
    assert np.isneginf(empty).all()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([], "float32"),
        (["bfloat16", "bfloat16"], "bfloat16"),
        (["bfloat16", "float16"], "float32"),
        (["bfloat16", "float32"], "float32"),
        (["float16", "float64", "float32"], "float64"),
    ],
)
def test_widest_holds_all(dtypes: list[str], expected: str) -> None:
    assert widest(map(jnp.dtype, dtypes)) == jnp.dtype(expected)

"""Blocks partition a tensor: each is the slice that its index says, and together they are the tensor."""

import itertools
import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from rootfree_optax._src.layout import split
from rootfree_optax._src.layout.split import Cut
from rootfree_optax._src.layout.unit import no_relayout

CUTS = st.lists(
    st.integers(1, 7).flatmap(lambda length: st.builds(Cut, st.just(length), st.integers(1, length))),
    min_size=1,
    max_size=3,
)
LAYERS = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@pytest.mark.parametrize(
    ("cut", "runs"),
    [(Cut(6, 6), [(0, 6, 1)]), (Cut(6, 2), [(0, 2, 3)]), (Cut(7, 3), [(0, 3, 2), (6, 1, 1)]), (Cut(1, 1), [(0, 1, 1)])],
)
def test_runs_of_a_cut(cut: Cut, runs: list) -> None:
    assert [(run.start, run.length, run.count) for run in cut.runs] == runs


def slices_by_shape(cuts: list[Cut]) -> dict[tuple[int, ...], list[tuple[slice, ...]]]:
    """Returns the slices of all blocks in row-major order, by block shape, from the starts of the pieces alone."""
    starts = [range(0, cut.length, cut.piece) for cut in cuts]
    slices: dict = {}
    for corner in itertools.product(*starts):
        ends = [min(start + cut.piece, cut.length) for start, cut in zip(corner, cuts, strict=True)]
        shape = tuple(end - start for start, end in zip(corner, ends, strict=True))
        slices.setdefault(shape, []).append(tuple(map(slice, corner, ends)))
    return slices


@hypothesis.given(CUTS, LAYERS)
@hypothesis.settings(derandomize=True, deadline=None, max_examples=25)
def test_blocks_are_slices_and_join_undoes_split(cuts: list[Cut], layers: tuple[int, ...]) -> None:
    shape = (*layers, *(cut.length for cut in cuts))
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)

    @jax.jit
    def both(array: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        blocks = split.split(array, cuts, no_relayout)
        return blocks, split.join(blocks, cuts, layers)

    blocks, joined = both(array)
    expected = slices_by_shape(cuts)
    windows = split.windows(cuts)
    assert [block.shape for block in blocks] == [
        (math.prod(layers) * split.block_count(window), *split.block_shape(window)) for window in windows
    ]
    for window, found in zip(windows, blocks, strict=True):
        each_layer = array.reshape(-1, *(cut.length for cut in cuts))
        slices = expected.pop(split.block_shape(window))
        np.testing.assert_array_equal(found, [layer[index] for layer in each_layer for index in slices])
    assert not expected
    np.testing.assert_array_equal(joined, array)


@pytest.mark.parametrize(
    ("cuts", "primitives"),
    [
        ([Cut(6, 6), Cut(4, 4)], ["reshape"]),
        ([Cut(6, 2), Cut(4, 4)], ["reshape"]),
        ([Cut(6, 6), Cut(4, 2)], ["reshape", "transpose"]),
        ([Cut(6, 2), Cut(4, 2)], ["reshape", "transpose", "reshape"]),
    ],
)
def test_an_even_cut_costs_as_many_operations_as_one_block(cuts: list[Cut], primitives: list[str]) -> None:
    array = jax.ShapeDtypeStruct((6, 4), np.float32)
    forward = jax.make_jaxpr(lambda array: split.split(array, cuts, no_relayout))(array)
    assert [equation.primitive.name for equation in forward.eqns] == primitives
    blocks = jax.eval_shape(lambda array: split.split(array, cuts, no_relayout), array)
    backward = jax.make_jaxpr(lambda blocks: split.join(blocks, cuts, ()))(blocks)
    assert [equation.primitive.name for equation in backward.eqns] == primitives[::-1]

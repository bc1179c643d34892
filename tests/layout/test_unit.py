"""Squeezing and merging keep a shape's entries in order, within the bound, and are undone exactly."""

import math

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from rootfree_optax._src.layout import Layout
from rootfree_optax._src.layout.unit import merged, squeezed

SHAPES = st.lists(st.integers(1, 9), max_size=5).map(tuple)


@pytest.mark.parametrize(("shape", "expected"), [((), (1,)), ((1, 1), (1,)), ((1, 3, 1, 2), (3, 2)), ((4, 5), (4, 5))])
def test_squeezed(shape: tuple, expected: tuple) -> None:
    assert squeezed(shape) == expected


@pytest.mark.parametrize(
    ("shape", "bound", "expected"),
    [
        ((3, 3, 64, 128), 8, (3, 3, 64, 128)),
        ((3, 3, 64, 128), 9, (9, 64, 128)),
        ((3, 3, 64, 128), 575, (9, 64, 128)),
        ((3, 3, 64, 128), 576, (576, 128)),
        ((3, 3, 64, 128), 10**6, (9 * 64 * 128,)),
        ((64, 2, 2, 2), 8, (64, 8)),
    ],
)
def test_merged(shape: tuple, bound: int, expected: tuple) -> None:
    assert merged(shape, bound) == expected


@hypothesis.given(SHAPES, st.integers(1, 100))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=100)
def test_merged_axes_are_as_long_as_the_bound_allows(shape: tuple, bound: int) -> None:
    rest = list(shape)
    for length in merged(shape, bound):
        parts = [rest.pop(0)]
        while math.prod(parts) < length or (rest and rest[0] == 1 and length <= bound):
            parts.append(rest.pop(0))
        assert math.prod(parts) == length
        assert len(parts) == 1 or length <= bound
        assert not rest or length * rest[0] > bound
    assert not rest


@hypothesis.given(SHAPES, st.integers(1, 100), st.data())
@hypothesis.settings(derandomize=True, deadline=None, max_examples=12)
def test_a_unit_reads_its_axes_without_reordering(shape: tuple, bound: int, data: st.DataObject) -> None:
    layers = data.draw(st.integers(0, len(shape)))
    array = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    (unit,) = Layout(stacked=layers, merge_dims=bound).plan(array).units
    assert unit.lengths == merged(squeezed(shape[layers:]), bound)
    (blocks,) = unit.to_blocks([array])
    assert blocks.shape == (math.prod(shape[:layers]), *unit.lengths)
    np.testing.assert_array_equal(blocks.ravel(), array.ravel())
    np.testing.assert_array_equal(unit.from_blocks([blocks])[0], array)

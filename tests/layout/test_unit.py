"""Squeezing and merging keep a shape's entries in order, within the bound, and are undone exactly."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from layouts import whole

from rootfree_optax._src.layout.unit import merge, squeeze

SHAPES = st.lists(st.integers(1, 9), max_size=5).map(tuple)


@pytest.mark.parametrize(("shape", "expected"), [((), (1,)), ((1, 1), (1,)), ((1, 3, 1, 2), (3, 2)), ((4, 5), (4, 5))])
def test_squeeze(shape: tuple, expected: tuple) -> None:
    assert squeeze(shape) == expected


@pytest.mark.parametrize(
    ("shape", "bound", "expected"),
    [
        ((3, 3, 64, 128), 8, (3, 3, 64, 128)),
        ((3, 3, 64, 128), 9, (9, 64, 128)),
        ((3, 3, 64, 128), 575, (9, 64, 128)),
        ((3, 3, 64, 128), 576, (576, 128)),
        ((3, 3, 64, 128), 10**6, (9 * 64, 128)),
        ((64, 2, 2, 2), 8, (64, 4, 2)),
        ((4, 4), 32, (4, 4)),
        ((5,), 32, (5,)),
        ((), 32, ()),
    ],
)
def test_merge(shape: tuple, bound: int, expected: tuple) -> None:
    assert merge(shape, bound) == expected


@hypothesis.given(SHAPES, st.integers(1, 100))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=100)
def test_merged_axes_are_as_long_as_the_bound_allows(shape: tuple, bound: int) -> None:
    *merged, last = merge((*shape, 7), bound)
    assert last == 7
    rest = list(shape)
    for length in merged:
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
    layers = tuple(range(data.draw(st.integers(0, len(shape)))))
    array = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    (unit,) = whole(layer_axes=layers, merge_dims=bound).plan(array).units
    assert unit.lengths == merge(squeeze(shape[len(layers) :]), bound)
    (blocks,) = unit.to_blocks([array])
    assert blocks.shape == (math.prod(shape[: len(layers)]), *unit.lengths)
    assert unit.layer_shape == shape[: len(layers)]
    np.testing.assert_array_equal(blocks.ravel(), array.ravel())
    np.testing.assert_array_equal(unit.from_blocks([blocks])[0], array)


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 2), (2, 0), (1, 2), (0, 1, 2)])
def test_layer_axes_move_to_the_front_and_back(axes: tuple[int, ...]) -> None:
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    (unit,) = whole(layer_axes=axes).plan(array).units
    (blocks,) = unit.to_blocks([jnp.asarray(array)])
    moved = np.moveaxis(array, axes, range(len(axes)))
    np.testing.assert_array_equal(blocks.ravel(), moved.ravel())
    np.testing.assert_array_equal(unit.from_blocks([blocks])[0], array)


def test_layer_axes_that_lead_are_not_moved() -> None:
    array = jnp.zeros((3, 4, 5))
    (leading,) = whole(layer_axes=(0, 1)).plan(array).units
    (last,) = whole(layer_axes=-1).plan(array).units
    there_and_back = lambda unit: jax.make_jaxpr(lambda a: unit.from_blocks(unit.to_blocks([a])))(array)
    primitives = lambda unit: [equation.primitive.name for equation in there_and_back(unit).eqns]
    assert "transpose" not in primitives(leading)
    assert primitives(last).count("transpose") == 2

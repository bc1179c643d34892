"""Specs are read from whatever tells them, and cuts nest with shards where blocks may."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import refuses
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rootfree_optax as rf
from rootfree_optax._src.layout.shards import nested_pieces, nests

SHAPES = {"a": {"kernel": (8, 16)}, "b": (16, 16)}
SPECS = {"a": {"kernel": PartitionSpec("x", ("y",))}, "b": PartitionSpec(None, "x")}
IS_SHAPE: Any = lambda node: isinstance(node, tuple)


def mesh_of(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def params_on(mesh: jax.sharding.Mesh) -> Any:
    place = lambda spec, shape: jax.device_put(jnp.zeros(shape), NamedSharding(mesh, spec))
    return jax.tree.map(place, SPECS, SHAPES)


def test_specs_are_told_by_trees_of_several_kinds_and_by_explicit_types_and_never_by_arrays_on_automatic_axes() -> None:
    mesh = mesh_of()
    params = params_on(mesh)
    named = jax.tree.map(lambda leaf: leaf.sharding, params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    boxed = {"params": {"a": {"kernel": {"value": SPECS["a"]["kernel"]}}, "b": SPECS["b"]}}
    plans = [rf.Layout(specs=specs).plan(params) for specs in (SPECS, named, params, shapes, boxed)]
    plans.append(rf.Layout().plan(params_on(mesh_of(AxisType.Explicit))))
    assert [unit.spec for unit in plans[0].units] == [(("x",), ("y",)), ((), ("x",))]
    assert plans == [plans[0]] * len(plans)
    assert [unit.spec for unit in rf.Layout().plan(params).units] == [((), ()), ((), ())]
    assert hash(rf.Layout(specs=named)) == hash(rf.Layout(specs=params))


@pytest.mark.contract
def test_shardings_tell_the_mesh_where_nothing_else_does() -> None:
    """Frameworks trace a state's shapes without a mesh, and make it by a program that has no arguments."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params_on(mesh_of()))
    tx = rf.sirf_shampoo(0.1, layout=rf.Layout(block_size=4, specs=shardings), mesh_axes=("x", "y"))

    def start() -> Any:
        params = jax.tree.map(jnp.ones, SHAPES, is_leaf=IS_SHAPE)
        return tx.update(params, tx.init(params), params)[1]

    assert [len(stack.size) for stack in jax.eval_shape(start)[0].stacks] == [24]  # 8 and 16 blocks on 8 devices
    state = jax.jit(start)()
    assert state[0].stacks[0].momentum.sharding.spec == PartitionSpec(("x", "y"))


def test_specs_that_do_not_fit_are_refused() -> None:
    params = jax.tree.map(jnp.zeros, SHAPES, is_leaf=IS_SHAPE)
    with refuses(ValueError, "specs need a mesh with the axes ['x', 'y']", "there is none", "jax.set_mesh"):
        rf.Layout(specs=SPECS).plan(params)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        with refuses(ValueError, "['x', 'y']", "('data',)"):
            rf.Layout(specs=SPECS).plan(params)
        with refuses(ValueError, "specs must have a PartitionSpec for every parameter", "'b'"):
            rf.Layout(specs={"a": {"kernel": PartitionSpec()}}).plan(params)
    with refuses(TypeError, "specs must be a tree of PartitionSpecs", "'data'", "'a'"):
        rf.Layout(specs={"a": "data"})


@given(
    shards=st.lists(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=2, max_size=2),
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=2),
    tensors=st.integers(1, 50),
    devices=st.sampled_from([1, 2, 8]),
)
def test_pieces_are_bounded_and_nest_where_a_length_within_the_bounds_does(
    shards: list[int], lengths: list[int], tensors: int, devices: int
) -> None:
    whole = tuple(length * parts * 16 for length, parts in zip(lengths, shards, strict=True))
    pieces = nested_pieces(whole, shards, (False, False), tensors, devices)
    for length, parts, piece in zip(whole, shards, pieces, strict=True):
        assert piece <= 512
        nesting = [n for n in range(128, 513) if length % n == 0 and nests(length, n, parts)]
        assert parts == 1 or not nesting or nests(length, piece, parts)


@pytest.mark.parametrize(
    ("shards", "tensors", "expected"),
    [
        ((16, 1), 12, (384, 384)),  # of 768×768 every one of 16 devices would have 12/16 of a block
        ((4, 4), 12, (384, 384)),
        ((1, 1), 12, (384, 384)),
        ((16, 1), 64, (384, 384)),
    ],
)
def test_devices_get_equally_many_blocks(shards: Any, tensors: int, expected: Any) -> None:
    assert nested_pieces((768, 768), shards, (False, False), tensors, 16 // math.prod(shards)) == expected
    assert nested_pieces((768, 768), shards, (True, True), tensors, 16 // math.prod(shards)) == (768, 768)


def test_a_number_pins_the_cuts() -> None:
    mesh = mesh_of()
    params = {"kernel": jax.ShapeDtypeStruct((96, 1024), np.float32)}
    with jax.set_mesh(mesh):
        follows = rf.Layout(specs={"kernel": PartitionSpec(None, ("x", "y"))}).plan(params)
        pinned = rf.Layout(block_size=400, specs={"kernel": PartitionSpec(None, "x")}).plan(params)
        alone = rf.Layout(block_size=400).plan(params)
    assert [stack.shape for stack in follows.stacks] == [(96, 128)]  # a block for each of eight devices
    assert pinned.stacks == alone.stacks
    assert [unit.spec for unit in pinned.units] == [((), ())]  # 400 and a shard of 256 do not nest

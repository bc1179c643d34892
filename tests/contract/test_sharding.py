"""Sharded equals replicated, and the state's types and shardings are those of `init`, on meshes of both kinds."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, in_contract, make_gradients, run, types, without_origins
from contract import ALL, Case, over, tolerance_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

SPECS = {
    "layer": {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("x")},
    "scale": PartitionSpec(),
}
SHAPES = {"layer": {"kernel": (8, 4), "bias": (8,)}, "scale": ()}
KINDS = pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])


def make_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def shardings_on(mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def replicated_params() -> Any:
    rng = np.random.default_rng(4)
    is_shape = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=is_shape)


def shardings(tree: Any) -> list[Any]:
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def assert_sharded_like(tree: Any, reference: Any) -> None:
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True):
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim), jax.tree_util.keystr(path)


@over(ALL)
@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
def test_on_an_explicit_mesh_the_state_and_updates_have_their_types(case: Case, is_set: bool) -> None:
    """Of shapes alone: nothing needs to be compiled. The mesh of the arrays serves where none is set."""
    tx = optax.partition({"all": case()}, "all")
    mesh = make_mesh(AxisType.Explicit)
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    params = jax.tree.map(placed, replicated_params(), shardings_on(mesh))
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    # A count that is made of no argument is on no mesh before its first step: its spec is the same.
    spec = lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type, jax.typeof(leaf).sharding.spec)
    assert jax.tree.map(spec, after) == jax.tree.map(spec, state)
    assert jax.tree.map(spec, updates) == jax.tree.map(spec, params)


@over(ALL, wiring=True)
@pytest.mark.parametrize("kind", [AxisType.Explicit, in_contract(AxisType.Auto)], ids=["explicit", "auto"])
def test_sharded_equals_replicated_and_the_state_keeps_its_types(case: Case, kind: AxisType) -> None:
    tx = case()
    params = replicated_params()
    gradients = make_gradients(params, 2)
    expected, expected_state = run(tx, params, gradients)

    mesh = make_mesh(kind)
    update = jax.jit(tx.update)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings_on(mesh))
        state = initial = tx.init(params)
        for gradient, wanted in zip(gradients, expected, strict=True):
            gradient = jax.device_put(gradient, shardings_on(mesh))
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            assert types(state) == types(initial)
            assert types(updates) == types(gradient)
            assert_sharded_like(updates, gradient)
            assert_close(jax.device_get(updates), jax.device_get(wanted), tolerance_of(case))
    assert_close(jax.device_get(state), jax.device_get(expected_state), tolerance_of(case))
    arrays = lambda tree: [leaf for leaf in jax.tree.leaves(without_origins(tree)) if leaf.ndim > 0]
    if case.diagonal or kind is AxisType.Explicit:  # else the compiler chooses how factors are laid out
        assert_sharded_like(arrays(state), arrays(initial))
    if case.diagonal:
        by_shape = {leaf.shape: leaf for leaf in jax.tree.leaves(params)}
        assert_sharded_like(arrays(state), [by_shape[leaf.shape] for leaf in arrays(state)])


@over(ALL, wiring=True)
def test_jitted_init_has_the_types_of_eager_init_on_an_explicit_mesh(case: Case) -> None:
    tx = case()
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(replicated_params(), shardings_on(mesh))
        assert types(jax.jit(tx.init)(params)) == types(tx.init(params))


@over(ALL, wiring=True)
@KINDS
def test_init_from_sharded_shapes_equals_init_from_arrays(case: Case, kind: AxisType) -> None:
    tx = case()
    mesh = make_mesh(kind)
    params = jax.device_put(replicated_params(), shardings_on(mesh))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    state, from_shapes = tx.init(params), tx.init(shapes)
    assert_close(jax.device_get(from_shapes), jax.device_get(state), tolerance=0)
    assert_sharded_like(from_shapes, state)


@pytest.mark.contract
@over(ALL)
def test_each_device_may_train_parameters_of_its_own_in_a_loop(case: Case) -> None:
    """Inside `jax.shard_map`, whose types say what varies between devices: the state's are the same from `init` on."""
    params = jax.tree.map(lambda p: jnp.stack([p, -2 * p]), replicated_params())
    gradients = jax.tree.map(lambda *steps: jnp.stack(steps, axis=1), *make_gradients(params, 3))
    tx = case()

    def train(params: Any, gradients: Any) -> Any:
        def step(carry: Any, gradient: Any) -> Any:
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0]

    mesh = jax.make_mesh((2,), ("ensemble",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec, lone = PartitionSpec("ensemble"), lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    of_a_device = lambda *trees: jax.tree.map(lambda leaf: leaf[None], train(*map(lone, trees)))
    trained = jax.jit(jax.shard_map(of_a_device, mesh=mesh, in_specs=spec, out_specs=spec))(params, gradients)
    expected = jax.jit(jax.vmap(train))(params, gradients)
    assert_close(jax.device_get(trained), jax.device_get(expected), tolerance_of(case))


@over(ALL, having="mesh_axes", wiring=True)
@pytest.mark.parametrize(
    ("mesh_axes", "mapped"),
    [
        ("x", ("x",)),
        (None, ("x", "y")),
        in_contract("x", ("x", "y")),
        in_contract(None, ("x",)),
    ],
    ids=str,
)
def test_a_state_made_inside_shard_map_serves_there(case: Case, mesh_axes: str | None, mapped: tuple[str, ...]) -> None:
    """With parameters that are the same everywhere, on a mesh of which some axes may stay automatic."""
    tx = case(mesh_axes=mesh_axes)
    params = replicated_params()
    first, second = make_gradients(params, 2)

    def two_steps(params: Any) -> Any:
        _, state = tx.update(first, tx.init(params), params)
        return tx.update(second, state, params)[0]

    mesh, spec = make_mesh(AxisType.Auto), PartitionSpec()
    inside = jax.shard_map(two_steps, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=set(mapped))
    update = jax.jit(case().update)
    _, state = update(first, case().init(params), params)
    assert_close(jax.device_get(jax.jit(inside)(params)), update(second, state, params)[0], tolerance_of(case))


@over(ALL, having="mesh_axes", wiring=True)
@pytest.mark.parametrize("mesh_axes", [in_contract(None), "y"])
def test_parameters_may_be_sharded_over_explicit_axes_that_are_not_mapped(case: Case, mesh_axes: str | None) -> None:
    tx, alone = case(mesh_axes=mesh_axes), case()
    params = {"a": jnp.asarray(np.random.default_rng(5).normal(size=(4, 16)), jnp.float32)}
    expected, _ = jax.jit(alone.update)(params, alone.init(params), params)
    mesh = make_mesh(AxisType.Explicit)
    whole = PartitionSpec()
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec(None, "x")))
        step = lambda params: tx.update(params, tx.init(params), params)[0]
        inside = jax.shard_map(step, in_specs=whole, out_specs=whole, axis_names={"y"})
        directions = jax.jit(inside)(placed)
    assert_close(jax.device_get(directions), jax.device_get(expected), tolerance_of(case))

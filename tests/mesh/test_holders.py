"""Blocks that follow the shards: the numbers of one device, exchanged among the holders of each block alone."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, in_contract, refuses
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rootfree_optax as rf
from rootfree_optax._src.mesh.stacks_on_mesh import HeldStacks, place_stacks

# Blocks of 8×8 and of 6×8: made of shards, and shards made of them; with layers, vectors and a table besides.
SHAPES = {"query": (3, 16, 16), "out": (16, 3, 16), "up": (16, 32), "down": (32, 16), "odd": (6, 16), "bias": (16,)}
OPTIONS: Any = {"block_size": 8, "layer_axes": {"query": 0, "out": 1}, "merge_dims": None}
WHOLE = rf.Layout(**OPTIONS)


def specs_of(x: str, y: str | None = None, z: str | None = None) -> dict[str, PartitionSpec]:
    both, last = ((y, x) if y else x), ((x, z) if z else x)
    specs = {"query": (None, x, y), "out": (y, None, last), "up": (x, y), "down": (both,), "odd": (None, last)}
    return {"bias": PartitionSpec(x), **{name: PartitionSpec(*spec) for name, spec in specs.items()}}


MESHES = {(8,): "x", (4, 2): "xy", (2, 2, 2): "xyz"}


def mesh_of(sizes: tuple[int, ...], kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    names = tuple(MESHES[sizes])
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def draw(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


class _Kept(NamedTuple):
    factors: Any


@dataclasses.dataclass(frozen=True)
class Products(rf.BlockRule):
    """Multiplies by running averages of gradients' products: of a block put together wrongly, all would differ."""

    def init(self, structures: Any, dtypes: Any) -> _Kept:
        return _Kept(tuple((jnp.zeros((s.dim, s.dim)),) for s in structures))

    def refresh(self, state: _Kept, gradient: Any, *, structures: Any, step: Any) -> _Kept:
        sides = gradient @ gradient.T, gradient.T @ gradient
        return _Kept(tuple((0.5 * old + new,) for (old,), new in zip(state.factors, sides, strict=True)))

    def precondition(self, state: _Kept, momentum: Any, *, gradient: Any, structures: Any, step: Any) -> Any:
        (left,), (right,) = state.factors
        direction = left @ momentum @ right
        return direction / jnp.linalg.norm(direction), state


def products(**options: Any) -> optax.GradientTransformationExtraArgs:
    by_products = rf.scale_by_kronecker(Products(), momentum=0.9, rest=rf.scale_by_rf_adam(), **options)
    return optax.chain(by_products, optax.scale(-0.1))


def train(tx: Any, steps: range, params: Any, state: Any, shardings: Any = None) -> tuple[Any, Any]:
    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    for seed in steps:
        params, state = jitted(params, state, jax.device_put(draw(seed), shardings))
    return params, state


def start(tx: Any, mesh: Any, specs: Any) -> tuple[Any, Any, Any]:
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(draw(0), shardings)
    return params, jax.jit(tx.init, out_shardings=rf.state_shardings(tx, params))(params), shardings


@functools.cache
def expected(make: Any, steps: int = 10) -> Any:
    params = jax.tree.map(jnp.asarray, draw(0))
    tx = make(layout=WHOLE)
    params, state = train(tx, range(1, 1 + steps), params, tx.init(params))
    return jax.device_get((params, rf.factors(state, params, WHOLE)))


@pytest.mark.parametrize(
    ("make", "kind", "sizes", "axes"),
    [
        in_contract(products, AxisType.Auto, (8,), "x"),
        in_contract(products, AxisType.Explicit, (4, 2), "yx"),
        (products, AxisType.Auto, (2, 2, 2), "xyz"),
        in_contract(products, AxisType.Auto, (4, 2), "x"),
        in_contract(products, AxisType.Explicit, (2, 2, 2), "zx"),
        *(
            in_contract(*case, MESHES[case[-1]])
            for case in [
                (functools.partial(rf.sirf_muon, 0.1, refresh_every=2), AxisType.Auto, (4, 2)),
                (functools.partial(rf.kl_shampoo, 0.1, refresh_every=2), AxisType.Explicit, (2, 2, 2)),
                (functools.partial(rf.sirf_shampoo, 0.1, refresh_every=2), AxisType.Auto, (8,)),
            ]
        ),
    ],
)
def test_ten_steps_equal_those_on_one_device(make: Any, kind: AxisType, sizes: Any, axes: str) -> None:
    """Told on automatic axes, and by the types on explicit ones."""
    mesh, specs = mesh_of(sizes, kind), specs_of(*MESHES[sizes])
    layout = rf.Layout(**OPTIONS, specs=specs if kind is AxisType.Auto else None)
    with jax.set_mesh(mesh):
        tx = make(layout=layout, mesh_axes=tuple(axes))
        params, state, shardings = start(tx, mesh, specs)
        params, state = train(tx, range(1, 11), params, state, shardings)
        for stack in state[0].stacks:
            assert np.sum(stack.number >= 0) == len(set(np.asarray(stack.number)) - {-1})
            for leaf in jax.tree.leaves(stack):
                assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(tuple(axes))), leaf.ndim)
        for name, sharding in shardings.items():
            assert params[name].sharding.is_equivalent_to(sharding, params[name].ndim)
        factors = rf.factors(state, params, layout)
    assert_close(jax.device_get((params, factors)), expected(make))


def held(layout: rf.Layout, params: Any, mesh: jax.sharding.Mesh) -> HeldStacks:
    with jax.set_mesh(mesh):
        placed = place_stacks(layout.plan(params), mesh.axis_names, params)
    assert isinstance(placed, HeldStacks)
    return placed


# What divides an axis that is merged with others, indexes layers, or is none of a block's: shape, and spec on 4×2.
CASES = {
    "experts": ((4, 16, 8), ("x", None, "y")),
    "layers_last": ((16, 24, 6), (None, "x", "y")),
    "window": ((2, 4, 8, 16), ("y", None, None, "x")),
    "heads": ((16, 4, 8), ("x", "y", None)),
    "uneven": ((20, 16), (None, "x")),
    "too_fine": ((8, 24), (None, ("x", "y"))),
    "joined/kernel": ((15, 16), (None, "x")),
    "joined/bias": ((16,), ("x",)),
    "one": ((1, 16, 8), (None, "x", None)),
}


@pytest.mark.contract
def test_every_device_has_the_blocks_that_its_numbers_tell() -> None:
    mesh, rng = mesh_of((4, 2)), np.random.default_rng(0)
    params = {name: np.float32(rng.normal(size=shape)) for name, (shape, _) in CASES.items()}
    options: Any = {
        "block_size": 8,
        "layer_axes": {"experts": 0, "layers_last": 2},
        "merge_dims": 8,
        "group": (rf.as_matrix("heads", 1), rf.weight_and_bias("joined/kernel", "joined/bias", output_axis=-1)),
    }
    specs = {name: PartitionSpec(*spec) for name, (_, spec) in CASES.items()}
    placed = held(rf.Layout(**options, specs=specs), params, mesh)
    plan = rf.Layout(**options).plan(params)
    assert [stack.count for stack in plan.stacks] == [stack.count for stack in placed.stacks]
    samples = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), params)
    with jax.set_mesh(mesh):
        stacks, both = placed.pack(params, "gradients"), placed.pack(samples, "curvature", sample_axis=True)
        numbers = placed.on_shards(_numbers)(placed)
        assert_close(placed.unpack(stacks, params), params, tolerance=0)
        with refuses(ValueError, "gradients must have the parameters' shapes", "'uneven'"):
            placed.pack(params | {"uneven": params["uneven"].T}, "gradients")
    for stack, pair, number, whole in zip(stacks, both, numbers, plan.pack(params), strict=True):
        is_own = np.asarray(number) >= 0
        assert sorted(np.asarray(number)[is_own]) == list(range(len(whole)))
        np.testing.assert_array_equal(stack[is_own], whole[np.asarray(number)[is_own]])
        np.testing.assert_array_equal(pair[is_own, 1], 2 * stack[is_own])
    spec_of = placed.holders.specs
    assert spec_of["experts"] == (("x",), (), ("y",))
    assert spec_of["window"] == (("y",), (), (), ("x",))
    assert spec_of["heads"] == (("x",), ("y",), ())
    assert spec_of["uneven"] == ((), ("x",))
    assert spec_of["too_fine"] == ((), ())
    assert spec_of["joined/kernel"] == ((), ())


def _numbers(placed: HeldStacks) -> Any:
    return tuple(placed.numbers(i) for i in range(len(placed.stacks)))


def test_an_update_exchanges_gradients_and_directions_once_each_among_holders_alone() -> None:
    mesh = mesh_of((4, 2))
    placed = held(rf.Layout(**OPTIONS, specs=specs_of("x", "y")), draw(0), mesh)

    def there_and_back(tree: Any) -> Any:
        return placed.unpack(placed.pack(tree, "gradients"), tree, {"bias": tree["bias"]})

    with jax.set_mesh(mesh):
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs_of("x", "y").items()}
        program = jax.jit(there_and_back).lower(jax.device_put(draw(0), shardings)).compile().as_text()
    exchanges = re.findall(
        r" (all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(", program
    )
    of_blocks = [kind for kind in placed.holders.kinds if kind.holders > 1]
    assert exchanges.count("all-to-all") == 2 * len(of_blocks)
    assert {len(kind.peers[0]) for kind in of_blocks} == {2}


# A decoder's layer, scanned: d, keys' width, hidden units.
DECODERS = {"125M": (12, 768, 256, 2048), "1.3B": (24, 2048, 512, 5632), "7B": (32, 4096, 1024, 14336)}


@pytest.mark.parametrize(
    ("decoder", "sizes"), [("125M", (16,)), ("125M", (4, 4)), ("1.3B", (256,)), ("1.3B", (16, 16)), ("7B", (16, 16))]
)
def test_cuts_nest_with_the_shards_of_real_models_and_devices_own_equally_many(decoder: str, sizes: Any) -> None:
    layers, d, kv, hidden = DECODERS[decoder]
    names = ("x", "y")[: len(sizes)]
    y = "y" if len(sizes) > 1 else None
    into, out_of = PartitionSpec(None, "x", y), PartitionSpec(None, y, "x")
    shapes = {"query": (d, d), "key": (d, kv), "value": (d, kv), "gate": (d, hidden), "up": (d, hidden)}
    specs = {**dict.fromkeys(shapes, into), "out": out_of, "down": out_of}
    shapes |= {"out": (d, d), "down": (hidden, d)}
    params = {name: jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for name, shape in shapes.items()}
    mesh = jax.sharding.AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        plan = rf.Layout(layer_axes=0, specs=specs).plan(params)
        placed = place_stacks(plan, names, params)
    devices = math.prod(sizes)
    volume = lambda counts: sum(n * math.prod(stack.shape) for n, stack in zip(counts, plan.stacks, strict=True))
    assert volume(placed.lengths) <= 1.05 * volume([stack.count for stack in plan.stacks])
    assert all(128 <= length <= 512 for stack in plan.stacks for length in stack.shape)
    shard = sum(math.prod(leaf.shape) for leaf in params.values()) // devices
    assert placed.holders.bytes_received([4] * len(plan.stacks)) <= 2 * 1.05 * 4 * shard


@pytest.mark.contract
def test_a_state_is_moved_between_meshes_and_refused_unless_it_was() -> None:
    first, second = (8,), (2, 2, 2)
    tx = {
        sizes: products(layout=rf.Layout(**OPTIONS, specs=specs_of(*MESHES[sizes])), mesh_axes=tuple(MESHES[sizes]))
        for sizes in (first, second)
    }
    with jax.set_mesh(mesh_of(first)):
        params, state, shardings = start(tx[first], mesh_of(first), specs_of("x"))
        params, state = train(tx[first], range(1, 4), params, state, shardings)
    params, state = jax.device_get((params, state))
    mesh = mesh_of(second)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs_of(*"xyz").items()}
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(params, shardings)
        moved = rf.move_state(state, tx[second], on_mesh)
        backwards = moved[0]._replace(stacks=jax.tree.map(lambda leaf: leaf[::-1], moved[0].stacks))
        wrong, _ = train(
            tx[second],
            range(4, 5),
            jax.tree.map(jnp.copy, on_mesh),
            jax.tree.map(jnp.copy, (backwards, *moved[1:])),
            shardings,
        )
        assert np.all(np.isnan(wrong["up"]))
        params, state = train(tx[second], range(4, 11), on_mesh, moved, shardings)
        smaller = rf.Layout(**{**OPTIONS, "block_size": 4})
        with refuses(ValueError, "cut for other shards", "block_size"):
            rf.move_state(state, products(layout=smaller, mesh_axes="x"), params)
    params, state = jax.device_get((params, state))
    alone = products(layout=WHOLE)
    with refuses(ValueError, "order", "rf.move_state"):
        alone.update(draw(1), state, params)
    state = rf.move_state(state, alone, params)
    assert jax.tree.structure(state) == jax.tree.structure(alone.init(params))
    assert_close((params, jax.device_get(rf.factors(state, params, WHOLE))), expected(products))


@pytest.mark.contract
def test_a_shard_mapped_step_works_on_a_state_that_was_made_outside() -> None:
    mesh = mesh_of((4, 2))
    sharded = specs_of("x", "y") | {"bias": PartitionSpec()}
    tx = products(layout=rf.Layout(**OPTIONS, specs=sharded), mesh_axes=("x", "y"))
    with jax.set_mesh(mesh):
        params, state, _ = start(tx, mesh, sharded)
        specs = jax.tree.map(lambda sharding: sharding.spec, rf.state_shardings(tx, params))
        everywhere = PartitionSpec()
        inside = jax.shard_map(tx.update, in_specs=(everywhere, specs, everywhere), out_specs=(everywhere, specs))
        wanted, _ = jax.jit(tx.update)(params, state, params)
        updates, after = jax.jit(inside)(params, state, params)
    assert_close(jax.device_get(updates), jax.device_get(wanted))
    assert jax.tree.structure(after) == jax.tree.structure(state)

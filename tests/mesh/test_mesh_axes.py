"""Stacks split over mesh axes: the numbers of one device, on every kind of mesh, and nothing sent in between."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, in_contract, refuses, shapes_and_dtypes, types
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import FSDP, LAYOUT, SETTINGS, TENSOR, draw, mesh_of, shardings_on

import rootfree_optax as rf
from rootfree_optax._src.blocks.curvature import RootFree
from rootfree_optax._src.blocks.sirf import PublishedRefresh
from rootfree_optax._src.mesh.stacks_on_mesh import place_stacks
from rootfree_optax._src.stacks.state import StackStep, init_stacks
from rootfree_optax._src.stacks.step import step_stacks

STEPS = 10
GRADIENTS = [draw(seed) for seed in range(1, STEPS + 1)]


scale_by_published = functools.partial(rf.published.scale_by_sirf_shampoo, damping=0.1, batch_size=4, layout=LAYOUT)


def train(tx: optax.GradientTransformationExtraArgs, shardings: Any = None) -> tuple[Any, Any]:
    """Returns parameters and state after ten steps, with the state donated."""

    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(draw(0), shardings)
    gradients = [jax.device_put(gradient, shardings) for gradient in GRADIENTS]
    if shardings is None:
        state, jitted = tx.init(params), jax.jit(step)
    else:
        of_state = rf.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=of_state)(params)
        places = (shardings, of_state)
        jitted = jax.jit(step, donate_argnums=(0, 1), in_shardings=(*places, shardings), out_shardings=places)
    for gradient in gradients:
        params, state = jitted(params, state, gradient)
    return params, state


def own_factors(state: Any) -> Any:
    """Returns the factors of every stack, without padding."""
    stacks = jax.device_get(state[0].stacks)
    rows = [
        np.arange(of_plan.count) if stack.number is None else np.argsort(stack.number)[-of_plan.count :]
        for of_plan, stack in zip(LAYOUT.plan(draw(0)).stacks, stacks, strict=True)
    ]
    return [
        [[part[own] for part in parts] for parts in stack.block.factors]
        for own, stack in zip(rows, stacks, strict=True)
    ]


def newton_within_a_radius(
    learning_rate: float, *, weight_decay: float, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Newton's root-free step within a trust radius."""
    rule = RootFree(step_size="newton", trust_radius=2.0)
    newton = rf.scale_by_kronecker(rule, weight=0.2, momentum=0.9, statistics_every=1, **options)
    return optax.chain(newton, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate))


def spectral(learning_rate: float, *, batch_size: int, **options: Any) -> optax.GradientTransformationExtraArgs:
    """SIRF-Muon, whose steps do not depend on the batch size."""
    del batch_size
    return rf.sirf_muon(learning_rate, **options)


@functools.cache
def expected(make: Any) -> tuple[Any, Any]:
    params, state = train(make(0.1, **SETTINGS))
    return jax.device_get((params, own_factors(state)))


@pytest.mark.parametrize(
    ("make", "kind", "sizes", "specs", "axes"),
    [
        (rf.published.sirf_shampoo, AxisType.Auto, (8,), FSDP, "data"),
        in_contract(rf.published.sirf_shampoo, AxisType.Explicit, (4, 2), TENSOR, ("data", "model")),
        in_contract(rf.published.sirf_shampoo, AxisType.Auto, (4, 2), TENSOR, "data"),
        in_contract(newton_within_a_radius, AxisType.Auto, (8,), FSDP, "data"),
        in_contract(newton_within_a_radius, AxisType.Explicit, (4, 2), TENSOR, ("data", "model")),
        # By default see tests/transforms/test_curvature.py, with silence and a spike.
        in_contract(spectral, AxisType.Auto, (8,), FSDP, "data"),
        in_contract(rf.published.rf_shampoo, AxisType.Auto, (2, 4), TENSOR, ("model", "data")),
        in_contract(rf.published.rf_shampoo, AxisType.Explicit, (1,), FSDP, "data"),
    ],
    ids=[
        "fsdp",
        "tensor-explicit",
        "tensor-over-data",
        "newton",
        "newton-explicit",
        "spectral",
        "inverses",
        "one-device",
    ],
)
def test_ten_steps_equal_those_on_one_device(make: Any, kind: AxisType, sizes: Any, specs: Any, axes: Any) -> None:
    mesh = mesh_of(kind, *sizes, devices=int(np.prod(sizes)))
    with jax.set_mesh(mesh):
        params, state = train(make(0.1, mesh_axes=axes, **SETTINGS), shardings_on(mesh, specs))
    plan = LAYOUT.plan(params)
    shards = int(np.prod([mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))
    for of_plan, stack in zip(plan.stacks, state[0].stacks, strict=True):
        for leaf in jax.tree.leaves(stack):
            assert leaf.shape[0] % shards == 0  # on explicit axes some kinds of blocks are padded by themselves
            assert kind is AxisType.Explicit or leaf.shape[0] - of_plan.count < shards
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(axes)), leaf.ndim)
            assert np.all(np.isfinite(leaf))
    assert_close((jax.device_get(params), own_factors(state)), expected(make))


@pytest.mark.parametrize("kind", [in_contract(AxisType.Auto), AxisType.Explicit], ids=["auto", "explicit"])
def test_the_state_is_sharded_from_init_on_and_updates_are_sharded_like_gradients(kind: AxisType) -> None:
    tx = rf.published.sirf_shampoo(0.1, mesh_axes=("data", "model"), **SETTINGS)
    mesh = mesh_of(kind, 4, 2)
    shardings = shardings_on(mesh, TENSOR)
    params = jax.device_put(draw(0), shardings)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    of_state = rf.state_shardings(tx, shapes)
    for init in (tx.init, jax.jit(tx.init)):  # without a mesh set, the parameters tell it
        state = init(params)
        for leaf, wanted in zip(jax.tree.leaves(state[0]), jax.tree.leaves(of_state[0]), strict=True):
            # One number, or none: nothing to lay out.
            assert leaf.ndim == 0 or leaf.size == 0 or leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    assert_close(jax.device_get(tx.init(shapes)), jax.device_get(state), tolerance=0)
    assert shapes_and_dtypes(jax.eval_shape(tx.init, shapes)) == shapes_and_dtypes(state)
    with jax.set_mesh(mesh):  # zeros that a jit makes of no argument, as momentum's, are on no mesh otherwise
        state = jax.jit(tx.init)(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert types(new_state) == types(state)
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(shardings[name], update.ndim), name


@pytest.mark.contract
@pytest.mark.parametrize("block_size", [None, in_contract(8), 12])
def test_updates_are_laid_out_as_gradients_are_where_no_type_says_so(block_size: int | None) -> None:
    mesh = mesh_of(AxisType.Auto, 8)
    specs = {"rows": PartitionSpec("data"), "columns": PartitionSpec(None, "data"), "vector": PartitionSpec("data")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {"rows": jnp.ones((16, 24)), "columns": jnp.ones((24, 16)), "vector": jnp.ones(16)}
    params = jax.device_put(params, shardings)
    layout, rest = rf.Layout(block_size=block_size), rf.scale_by_rf_adam()
    tx = rf.scale_by_kronecker(PublishedRefresh(), batch_size=1, layout=layout, rest=rest, mesh_axes="data")
    state = jax.jit(tx.init, out_shardings=rf.state_shardings(tx, params))(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(shardings[name], update.ndim), name


@pytest.mark.contract
def test_a_shard_mapped_step_works_on_its_own_blocks() -> None:
    """On three devices some have two blocks of a stack, and some have padding."""
    tx = rf.published.sirf_shampoo(0.1, mesh_axes="data", **SETTINGS)
    mesh = mesh_of(AxisType.Auto, 3, devices=3)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), draw(0))
    params = jax.device_put(draw(0), everywhere)
    specs = jax.tree.map(lambda sharding: sharding.spec, rf.state_shardings(tx, params))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs, PartitionSpec("data")),
        out_specs=(PartitionSpec(), specs),
    )
    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        own = jax.tree.map(lambda g: g[0], gradients)
        updates, state = tx.update(jax.lax.pmean(own, "data"), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    offsets = np.float32([-1, 0, 1])  # each rank's gradient differs, their mean is the gradient
    for gradient in GRADIENTS:
        ranks = jax.tree.map(lambda g: np.stack([g * (1 + offset) for offset in offsets]), gradient)
        params, state = step(params, state, ranks)
    assert_close((jax.device_get(params), own_factors(state)), expected(rf.published.sirf_shampoo))


@pytest.mark.parametrize(
    ("structure", "rule"),
    [
        ("dense", RootFree(step_size="newton", trust_radius=2.0)),
        ("dense", PublishedRefresh(riemannian_momentum=0.5, cache_preconditioner=True)),
        ("triltoeplitz", PublishedRefresh()),
    ],
    ids=["root-free", "published", "toeplitz"],
)
def test_nothing_is_sent_within_a_step(structure: str, rule: rf.BlockRule) -> None:
    mesh = mesh_of(AxisType.Auto, 8)
    layout = rf.Layout(block_size=4, structure=structure, merge_dims=None, diagonal=None)
    params = {"kernel": jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))}
    placed = place_stacks(layout.plan(params), "data", params)
    [stack] = placed.stacks
    by_block = NamedSharding(mesh, PartitionSpec("data"))
    dtypes = [[jnp.float32] * 2]
    given = (placed, rule, dtypes, [jnp.float32], placed.anchor(params))
    [state] = placed.on_shards(init_stacks, len(given))(*given)
    gradient = jax.device_put(jnp.ones((16, 4, 4)), by_block)

    @jax.jit
    def both(gradient: Any, state: Any, count: jax.Array) -> Any:
        is_due = count % 2 == 0
        step = StackStep(
            placed.stacks,
            rule,
            rf.Step(count, 0.1, 0.1, batch_size=4),
            observe=is_due,
            refresh=is_due,
            momentum=0.5,
            nesterov=True,
        )
        return placed.on_shards(step_stacks)(step, (gradient,), (gradient,), (state,))

    program = both.lower(gradient, state, jnp.int32(0)).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in program.as_text()
    assert f"f32[{stack.count // 8},4,4]" in program.as_text()


def test_mesh_axes_are_never_ignored() -> None:
    tx = scale_by_published(mesh_axes="data")
    params = jax.tree.map(jnp.asarray, draw(0))
    with refuses(ValueError, "mesh_axes='data'", "there is none", "jax.set_mesh"):
        tx.init(params)
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))):
        for function in (tx.init, jax.jit(tx.init)):
            with refuses(ValueError, "the axes ('x',)"):
                function(params)
    with refuses(TypeError, "mesh_axes", "1"):
        rf.published.sirf_shampoo(0.1, mesh_axes=1)
    for wrong in ((), ("data", "data")):
        with refuses(ValueError, "at least one mesh axis and none twice"):
            rf.published.rf_shampoo(0.1, mesh_axes=wrong)


@pytest.mark.contract
def test_a_state_of_another_mesh_is_refused_and_serves_once_it_is_moved() -> None:
    tx = scale_by_published(mesh_axes="data")
    alone = scale_by_published()
    params = jax.tree.map(jnp.asarray, draw(0))
    wanted, _ = jax.jit(alone.update)(params, alone.init(params))
    states = {}
    for size in (2, 8):
        with jax.set_mesh(mesh_of(AxisType.Auto, size, devices=size)):
            states[size] = jax.device_get(tx.init(params))
    with (
        jax.set_mesh(mesh_of(AxisType.Auto, 8)),
        refuses(ValueError, "mesh_axes='data'", "of another mesh", "move_state"),
    ):
        jax.jit(tx.update)(params, states[2])
    with refuses(ValueError, "mesh_axes=None", "of another mesh", "rf.move_state"):
        alone.update(params, states[8])
    one = mesh_of(AxisType.Auto, 1, devices=1)
    with jax.set_mesh(one):
        with refuses(ValueError, "mesh_axes='data'", "of another mesh", "rf.move_state"):
            jax.jit(tx.update)(params, states[8])
        params = jax.device_put(params, NamedSharding(one, PartitionSpec()))
        direction, _ = jax.jit(tx.update)(params, rf.move_state(states[8], tx, params))
    assert_close(jax.device_get(direction), wanted)


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        in_contract("dense", {"statistics_every": 1}),
        in_contract("block2diagonal", {"momentum": 0.9, "nesterov": True}),
    ],
    ids=["statistics", "momentum"],
)
def test_a_start_is_divided_too(structure: str, options: dict[str, Any]) -> None:
    """On each device by itself, and with the same result as whole; padding blocks never start."""
    mesh = mesh_of(AxisType.Explicit, 8)
    layout = rf.Layout(block_size=4, structure=structure, merge_dims=None, diagonal=None)
    make = functools.partial(
        rf.scale_by_kronecker, RootFree(), weight=0.2, damping=0.1, layout=layout, refresh_every=2, **options
    )
    whole, divided = make(), make(mesh_axes="data")
    names = ("odd", "bias")  # four blocks and one, so that both stacks are padded
    take = lambda tree: {name: tree[name] for name in names}
    params = take(draw(0))
    expected, state = jax.jit(whole.update)(take(draw(1)), whole.init(params), params)
    with jax.set_mesh(mesh):
        params, gradients = (jax.device_put(take(draw(i)), take(shardings_on(mesh, FSDP))) for i in range(2))
        updates, new = jax.jit(divided.update)(gradients, divided.init(params), params)
        shardings = rf.state_shardings(divided, params)
    same = jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), new, shardings)
    assert jax.tree.all(same)
    assert_close(jax.device_get(updates), jax.device_get(expected))
    for stack, part in zip(state.stacks, new.stacks, strict=True):
        assert (stack.block.seen > 0).all()
        assert (jax.device_get(part.block.seen) > 0).sum() == len(stack.block.seen)

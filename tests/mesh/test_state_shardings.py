"""What `state_shardings` says is what `init` makes, through every wrapper of Optax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from checks import assert_close, refuses
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import FSDP, LAYOUT, SHAPES, TENSOR, draw, mesh_of, shardings_on

import rootfree_optax as rf


def mixed() -> optax.GradientTransformation:
    matrices = lambda tree: jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "other", tree)
    told = {name: PartitionSpec(*spec) for name, spec in FSDP.items()}
    layout = dataclasses.replace(LAYOUT, specs=told)
    make = functools.partial(rf.sirf_shampoo, layout=layout, mesh_axes="data", refresh_every=2, step_size="newton")
    injected = optax.inject_hyperparams(
        make,
        static_args=("layout", "refresh_every", "statistics_every", "mesh_axes", "step_size", "nesterov"),
    )
    matrix = injected(learning_rate=0.1, batch_size=4, damping=0.1)
    masked = optax.masked(optax.scale_by_adam(), lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 1, tree))
    other = optax.chain(masked, rf.rf_adamw(0.1))
    return optax.MultiSteps(optax.partition({"matrix": matrix, "other": other}, matrices), every_k_schedule=2)


def test_state_shardings_are_those_of_init_through_every_wrapper() -> None:
    tx = mixed()
    states = []
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = mesh_of(kind, 8)
        with jax.set_mesh(mesh):
            params = jax.device_put(draw(0), shardings_on(mesh, FSDP))
            shardings = rf.state_shardings(tx, params)
            state = tx.init(params) if kind is AxisType.Explicit else jax.jit(tx.init, out_shardings=shardings)(params)
        assert jax.tree.structure(state) == jax.tree.structure(shardings)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert sharding.mesh == mesh
            spec = jax.typeof(leaf).sharding.spec if kind is AxisType.Explicit else leaf.sharding.spec
            assert NamedSharding(mesh, spec).is_equivalent_to(sharding, leaf.ndim)
        states.append(state)
    split = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(states[1]) if leaf.ndim > 0}
    assert len(split) >= 3  # over the first axis, over the second, and nowhere
    assert_close(jax.device_get(states[1]), jax.device_get(states[0]), tolerance=0)


def test_state_shardings_of_the_diagonal_methods_are_the_parameters() -> None:
    mesh = mesh_of(AxisType.Auto, 4, 2)
    shardings = shardings_on(mesh, TENSOR)
    shapes = {name: jax.ShapeDtypeStruct(SHAPES[name], jnp.float32, sharding=s) for name, s in shardings.items()}
    state = rf.state_shardings(rf.scale_by_rf_adam(), shapes)
    assert state.count.spec == PartitionSpec()
    for tree in (state.mu, state.nu):
        for name, sharding in shardings.items():
            assert tree[name].is_equivalent_to(sharding, len(SHAPES[name]))
    with refuses(ValueError, "one mesh", "got 0"):
        rf.state_shardings(optax.adam(0.1), draw(0))

"""Where factors start: at a number, or at the scale of each block's first gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from kronecker_runs import EXACT_SETTING, draw, last, params_of, run, scale_by_exact
from meshes import mesh_of

import rootfree_optax as rf
from rootfree_optax._src.stacks import refresh as refreshing


def test_the_start_at_a_number():
    params = {"matrix": jnp.zeros((3, 2)), "vector": jnp.zeros(3)}
    factors = rf.Layout().plan(params).factors(rf.scale_by_sirf_shampoo(initial_scale=16.0, batch_size=1).init(params))
    np.testing.assert_allclose([np.diag(k)[0] for k in factors["matrix"]], 16**-0.25)
    np.testing.assert_allclose(np.diag(factors["vector"][0]), 16**-0.5)


FIRST = {"initial_scale": "first_gradient", "update_every": lambda count: count >= 100}  # the start alone
ROOT = lambda g: 4 * np.mean(np.square(g)) + EXACT_SETTING["damping"]  # what the factors' squares multiply to, inverted


def started_at(factors):
    return 1 / np.prod([np.float64(k[0, 0]) ** 2 for k in factors])


def test_the_start_at_the_first_gradient_of_each_block():
    """In one scan, on stacks: blocks whose gradient is zero or not finite at first wait for one that says something."""
    shapes = {"dense": (4, 4), "late": (4, 4), "broken": (4, 4), "embedding": (50, 3), "never": (3,), "huge": (2, 2)}
    gradients = draw(shapes, steps=3)
    gradients["late"][0] = 0
    gradients["broken"][0, 1, 1] = np.nan
    gradients["embedding"][:, 5:] = 0
    gradients["never"][:] = 0
    gradients["huge"] *= np.float32(1e25)
    _, states = run(scale_by_exact(**FIRST), gradients)
    factors = rf.Layout().plan(params_of(gradients)).factors(last(states))
    np.testing.assert_allclose(started_at(factors["dense"]), ROOT(gradients["dense"][0]), rtol=1e-5)
    np.testing.assert_allclose(started_at(factors["late"]), ROOT(gradients["late"][1]), rtol=1e-5)
    np.testing.assert_allclose(started_at(factors["broken"]), ROOT(gradients["broken"][1]), rtol=1e-5)
    np.testing.assert_allclose(started_at(factors["embedding"]), ROOT(gradients["embedding"][0, :5]), rtol=1e-5)
    np.testing.assert_array_equal(factors["never"][0], np.eye(3))
    np.testing.assert_allclose(started_at(factors["huge"]), ROOT(np.float64(gradients["huge"][0])), rtol=1e-5)


def test_a_block_starts_after_the_others_of_its_stack():
    gradients = draw({"early": (4, 4), "late": (4, 4)}, steps=3)
    gradients["late"][:2] = 0
    _, states = run(scale_by_exact(**FIRST), gradients)
    factors = rf.Layout().plan(params_of(gradients)).factors(last(states))
    np.testing.assert_allclose(started_at(factors["early"]), ROOT(gradients["early"][0]), rtol=1e-5)
    np.testing.assert_allclose(started_at(factors["late"]), ROOT(gradients["late"][2]), rtol=1e-5)


def test_a_large_block_starts_at_no_gradient_with_a_nan_in_any_place():
    """XLA's vectorized maximum of floats drops some on a CPU, by where they are."""
    gradients = draw({"w": (64, 256)}, steps=1)
    for place in ((0, 0), (63, 255), (17, 101)):
        bad = {"w": gradients["w"].copy()}
        bad["w"][0][place] = np.nan
        _, states = run(scale_by_exact(**FIRST), bad)
        assert not last(states).started[0].any()
        for factor in rf.Layout().plan(params_of(bad)).factors(last(states))["w"]:
            np.testing.assert_array_equal(factor, np.eye(len(factor)))


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (lambda tx: optax.MultiSteps(tx, 2), ("w", "other")),
        (lambda tx: optax.masked(tx, {"w": True, "other": False}), ("w",)),
        (lambda tx: optax.chain(optax.scale(1.0), tx), ("w", "other")),
    ],
    ids=["MultiSteps", "masked", "chain"],
)
def test_the_start_under_wrappers(wrap, named):
    """MultiSteps hands on the mean of two gradients, the others both of them, of which the first is zero."""
    tx = wrap(scale_by_exact(**FIRST))
    gradients = draw({"w": (3, 4), "other": (2,)}, steps=2)
    gradients["w"][0] = 0
    with jax.numpy_dtype_promotion("standard"):  # for MultiSteps
        _, states = run(tx, gradients)
    factors = rf.Layout().plan(params_of({name: gradients[name] for name in named})).factors(last(states))
    first = gradients["w"].mean(axis=0) if isinstance(tx, optax.MultiSteps) else gradients["w"][1]
    np.testing.assert_allclose(started_at(factors["w"]), ROOT(first), rtol=1e-5)


@pytest.mark.parametrize(("interval", "idle"), [(1, 1), (1, 40), (10, 10), (10, 40)])
def test_a_block_without_a_gradient_waits_as_it_is(interval, idle):
    """Refreshed with none, its factors would grow until they know of the damping alone."""
    gradients = draw({"w": (4, 3)}, steps=idle + 1)
    gradients["w"][:idle] = 0
    tx = scale_by_exact(initial_scale="first_gradient", update_every=interval, damping=1e-6)
    directions, states = run(tx, gradients)
    waiting = jax.tree.map(lambda leaf: leaf[-2], states)
    for factor in rf.Layout().plan(params_of(gradients)).factors(waiting)["w"]:
        np.testing.assert_array_equal(factor, np.eye(len(factor)))
    expected, _ = run(tx, {"w": gradients["w"][-1:]})
    np.testing.assert_allclose(directions["w"][-1], expected["w"][-1], rtol=1e-5)


def test_the_start_of_a_tiny_gradient_keeps_within_the_range_of_half_precision():
    tx = scale_by_exact(initial_scale="first_gradient", damping=1e-12, update_every=10, cache_products=True)
    params = {"w": jnp.zeros(3, jnp.float16)}
    directions, state = jax.jit(tx.update)({"w": jnp.full(3, 6e-6, jnp.float16)}, tx.init(params))
    assert state.started[0].all()
    for array in jax.tree.leaves((directions, state.factors, state.products)):
        assert np.isfinite(np.float32(array)).all()


def test_padding_is_not_waited_for(monkeypatch):
    """Its gradient is zero for good, and as long as any block waits, all gradients are searched at every step."""
    params = {"w": jnp.ones(3)}
    tx = scale_by_exact(initial_scale="first_gradient", update_every=10, block_axes="data")
    with jax.set_mesh(mesh_of(AxisType.Auto, 2, devices=2)):
        _, state = jax.jit(tx.update)(params, tx.init(params))
        assert jax.device_get(state.started[0]).tolist() == [True, False]
        jax.clear_caches()
        monkeypatch.setattr(refreshing, "is_first", lambda gradient, started: jnp.full_like(started, True))
        _, after = jax.jit(tx.update)(params, state)
        jax.clear_caches()  # no other test may find a program with the search replaced
    np.testing.assert_array_equal(after.factors[0][0][0], state.factors[0][0][0])

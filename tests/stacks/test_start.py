"""When blocks start: each at its own first gradient, and no padding is waited for."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import refuses
from jax.sharding import AxisType
from kronecker_runs import compile_run, draw, last, run
from meshes import mesh_of

import rootfree_optax as rf
from rootfree_optax._src.stacks import step as step_module
from rootfree_optax._src.transforms.kronecker import find_kronecker_states


class Start(NamedTuple):
    """What a block has started with: its gradient, and how often."""

    gradient: jax.Array
    starts: jax.Array


@dataclasses.dataclass(frozen=True)
class KeepsFirst(rf.BlockRule):
    """A rule that keeps the gradient that a block starts at."""

    def init(self, structures, dtypes):
        return Start(jnp.zeros([s.dim for s in structures]), jnp.zeros([], jnp.int32))

    def start(self, state, gradient, *, structures, step):
        return Start(gradient, state.starts + 1)

    def waits(self, state):
        return state.starts == 0

    def precondition(self, state, momentum, *, gradient, structures, step):
        return state.gradient, state


@pytest.mark.contract
def test_a_gradient_of_subnormal_numbers_is_waited_out():
    """Their squares vanish: a block that started with them had no curvature, and no refresh of it ever was finite."""
    tx, params = rf.scale_by_sirf_shampoo(refresh_every=1), jnp.zeros((4, 3))
    state, update = tx.init(params), jax.jit(tx.update)  # quick programs take subnormal numbers for zero
    for size in (1e-40, 1e-40, 1.0):
        _, state = update(jnp.full((4, 3), size), state, params)
        [stack] = state.stacks
        assert stack.block.refused == 0
        assert stack.block.seen == (0 if size < 1 else 2)


def test_each_block_starts_once_at_its_first_gradient_that_is_finite_and_not_zero():
    shapes = {"dense": (4, 4), "late": (4, 4), "broken": (4, 4), "rows": (50, 3), "never": (3,), "huge": (2, 2)}
    gradients = draw(shapes, steps=4)
    gradients["late"][:2] = 0
    gradients["broken"][0, 1, 1] = np.nan
    gradients["broken"][1, 0, 0] = np.inf
    gradients["rows"][:, 5:] = 0
    gradients["never"][:] = 0
    gradients["huge"] *= np.float32(1e30)
    firsts, states = run(rf.scale_by_kronecker(KeepsFirst()), gradients)
    for name, at in {"dense": 0, "late": 2, "broken": 2, "rows": 0, "huge": 0}.items():
        np.testing.assert_array_equal(firsts[name][:at], 0)
        np.testing.assert_array_equal(firsts[name][at:], np.broadcast_to(gradients[name][at], firsts[name][at:].shape))
    np.testing.assert_array_equal(firsts["never"], 0)
    starts = [stack.block.starts.sum() for stack in last(states).stacks]
    assert sum(starts) == len(shapes) - 1


def test_a_large_block_starts_at_no_gradient_with_a_nan_in_any_place():
    """XLA's vectorized maximum of floats drops some on a CPU, by where they are."""
    run_once = compile_run(lambda: rf.scale_by_kronecker(KeepsFirst()))
    gradients = draw({"w": (64, 256)}, steps=1)
    for place in ((0, 0), (63, 255), (17, 101)):
        bad = {"w": gradients["w"].copy()}
        bad["w"][0][place] = np.nan
        assert last(run_once(bad)[1]).stacks[0].block.starts == 0
    assert last(run_once(gradients)[1]).stacks[0].block.starts == 1


def test_a_block_starts_at_the_curvature_that_is_given():
    params = {"w": jnp.ones((3, 2))}
    tx = rf.scale_by_kronecker(KeepsFirst())
    first, _ = jax.jit(tx.update)(params, tx.init(params), curvature={"w": jnp.full((3, 2), 5.0)})
    np.testing.assert_array_equal(first["w"], np.full((3, 2), 5))


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda tx: optax.MultiSteps(tx, 2), lambda w: w.mean(axis=0)),
        (lambda tx: optax.masked(tx, {"w": True, "other": False}), lambda w: w[1]),
    ],
    ids=["MultiSteps", "masked"],
)
def test_the_start_under_wrappers(wrap, expected):
    """MultiSteps hands on the mean of two gradients, of which the first is zero."""
    gradients = draw({"w": (3, 4), "other": (2,)}, steps=2)
    gradients["w"][0] = 0
    with jax.numpy_dtype_promotion("standard"):  # for MultiSteps
        _, states = run(wrap(rf.scale_by_kronecker(KeepsFirst())), gradients)
    [state] = find_kronecker_states(last(states))
    [block] = [stack.block for stack in state.stacks if stack.block.gradient.ndim == 3]
    np.testing.assert_allclose(block.gradient[0], expected(gradients["w"]), rtol=1e-6)


def test_a_block_without_a_gradient_is_not_refreshed_before_it_starts():
    """Its factors would grow until they know of the damping alone."""
    run_now = compile_run(lambda: rf.scale_by_sirf_shampoo(None, damping=1e-6, refresh_every=1))
    gradients, idle = draw({"w": (4, 3)}, steps=30), 20
    expected, _ = run_now(gradients)
    late = {"w": np.concatenate([np.zeros_like(gradients["w"][:idle]), gradients["w"][:-idle]])}
    directions, states = run_now(late)
    for (parts,), d in zip(states.stacks[0].block.factors, (4, 3), strict=True):
        np.testing.assert_array_equal(parts[idle - 1, 0], np.eye(d))
    np.testing.assert_allclose(directions["w"][idle:], expected["w"][:-idle], rtol=1e-3)


def test_padding_is_not_waited_for(monkeypatch):
    """Its gradient stays zero, and as long as any block waits, all gradients are searched at every step."""
    params = {"w": jnp.ones(3)}
    tx = rf.scale_by_kronecker(KeepsFirst(), mesh_axes="data")
    with jax.set_mesh(mesh_of(AxisType.Auto, 2, devices=2)):
        _, state = jax.jit(tx.update)(params, tx.init(params))
        assert jax.device_get(state.stacks[0].block.starts).tolist() == [1, 0]
        jax.clear_caches()
        monkeypatch.setattr(step_module, "_is_first", lambda waits, gradient, **numbers: jnp.full_like(waits, True))
        _, after = jax.jit(tx.update)(params, state)
        jax.clear_caches()  # no other test may find a program with the search replaced
    assert jax.device_get(after.stacks[0].block.starts).tolist() == [1, 0]


@dataclasses.dataclass(frozen=True)
class StartsWithoutWaiting(rf.BlockRule):
    """A rule that does not say whether a block waits."""

    def init(self, structures, dtypes):
        return jnp.zeros([])

    def start(self, state, gradient, *, structures, step):
        return state

    def precondition(self, state, momentum, *, gradient, structures, step):
        return momentum, state


def test_a_rule_that_starts_says_whether_it_waits():
    params = {"w": jnp.ones((2, 2))}
    tx = rf.scale_by_kronecker(StartsWithoutWaiting())
    with refuses(TypeError, "StartsWithoutWaiting overrides start", "waits"):
        tx.update(params, tx.init(params))

"""Momentum of gradients in the Kronecker transformation: preconditioned by the curvature of the gradients alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import in_contract

import rootfree_optax as rf
from rootfree_optax._src.blocks.curvature import RootFree
from rootfree_optax._src.blocks.rf import CholeskyInverse
from rootfree_optax._src.blocks.sirf import PublishedRefresh

WHOLE = rf.Layout(diagonal=None, merge_dims=None)
RULES = pytest.mark.parametrize(
    "rule",
    [
        RootFree(step_size="newton"),
        PublishedRefresh(),
        in_contract(CholeskyInverse()),
    ],
    ids=lambda rule: type(rule).__name__,
)


@RULES
@pytest.mark.parametrize("nesterov", [False, in_contract(True)])
def test_momentum_is_preconditioned_by_the_curvature_of_the_gradients(rule, nesterov):
    options = {
        "weight": 0.3,
        "damping": 0.1,
        "batch_size": 3,
        "refresh_every": 2,
        "statistics_every": 1,
        "layout": WHOLE,
    }
    tx = rf.scale_by_kronecker(rule, momentum=0.75, nesterov=nesterov, **options)
    alone = rf.scale_by_kronecker(rule, **options)
    params = {"w": jnp.zeros((3, 2))}
    state, state_alone = tx.init(params), alone.init(params)
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    total = np.zeros((3, 2))
    for t in range(1, 5):
        gradients = {"w": jnp.asarray(np.random.default_rng(t).normal(size=(3, 2)), jnp.float32)}
        direction, state = update(gradients, state, params)
        _, state_alone = update_alone(gradients, state_alone, params)
        chex.assert_trees_all_equal(state.stacks[0].block, state_alone.stacks[0].block)
        first, second = (np.float64(parts[0][0]) for parts in state.stacks[0].block.factors)
        if isinstance(rule, CholeskyInverse):
            first, second = np.linalg.inv(first), np.linalg.inv(second)
        else:
            first, second = first @ first.T, second @ second.T
        if isinstance(rule, RootFree):  # of the curvature in units of 2ᵉ, for one sample
            first /= 3 * 4.0 ** int(state.stacks[0].block.exponent[0])
        total = 0.75 * total + 0.25 * np.asarray(gradients["w"])
        average = total / (1 - 0.75**t)
        if nesterov:
            average = (0.25 * np.asarray(gradients["w"]) + 0.75 * total) / (1 - 0.75 ** (t + 1))
        np.testing.assert_allclose(direction["w"], first @ average @ second, rtol=1e-4, atol=1e-5)


@RULES
def test_without_momentum_no_average_is_kept(rule):
    state = rf.scale_by_kronecker(rule).init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})
    assert [stack.momentum for stack in state.stacks] == [None, None]
    optimizer = rf.sirf_shampoo(0.1, momentum=None, nesterov=True)
    assert {stack.momentum for stack in optimizer.init({"w": jnp.ones((3, 2))})[0].stacks} == {None}


@RULES
def test_it_has_its_own_dtype_and_keeps_nothing_that_is_not_finite(rule):
    tx = rf.scale_by_kronecker(rule, momentum=0.5, nesterov=True, mu_dtype=jnp.bfloat16)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params))
    assert {stack.momentum.dtype for stack in state.stacks} == {jnp.dtype(jnp.bfloat16)}
    bad = {**params, "w": params["w"].at[1, 1].set(jnp.nan)}
    direction, after = update(bad, state)
    assert not np.isfinite(direction["w"]).all()
    flat = np.concatenate([np.float32(stack.momentum).ravel() for stack in after.stacks])
    assert sorted(flat) == [1.0, *[1.5] * 7]


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match=r"momentum must be given for nesterov=True, got None"):
        rf.scale_by_kronecker(RootFree(), nesterov=True)


def test_large_half_precision_gradients_stay_within_its_range():
    tx = rf.scale_by_kronecker(RootFree(), momentum=0.875)
    large, small = jnp.full((3, 2), 30000, jnp.float16), jnp.ones((3, 2), jnp.float16)
    state, update = tx.init(large), jax.jit(tx.update)
    for gradient in (large, large, large, small):
        _, state = update(gradient, state)
        assert np.isfinite(state.stacks[0].momentum).all()

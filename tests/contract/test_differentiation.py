"""Updates are differentiable, backwards too: for hyperparameters and initial parameters that are learned."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import make_params
from contract import OPTIMIZERS, Case, over

import rootfree_optax as rf


def loss(params: Any) -> jax.Array:
    return sum(jnp.sum(jnp.square(jnp.sin(leaf) - 0.3)) for leaf in jax.tree.leaves(params))


def after_three_steps(case: Case, **changes: Any) -> Any:
    """Returns the loss after three steps, of a logarithm of the damping and a factor on the parameters."""
    params = make_params()

    def trained(log_damping: jax.Array, factor: jax.Array) -> jax.Array:
        tx = case(damping=0.1 * jnp.exp(log_damping), **changes)

        def step(carry: Any, _: None) -> Any:
            point, state = carry
            updates, state = tx.update(jax.grad(loss)(point), state, point)
            return (jax.tree.map(jnp.add, point, updates), state), None

        point = jax.tree.map(lambda p: factor * p, params)
        return loss(jax.lax.scan(step, (point, tx.init(point)), length=3)[0][0])

    return jax.jit(trained)


@pytest.mark.contract
@over(case for case in OPTIMIZERS if case.differentiable)
def test_derivatives_are_those_of_finite_differences(case: Case) -> None:
    trained, at, step = after_three_steps(case), (jnp.float32(0.0), jnp.float32(1.0)), 3e-3
    gradient = jax.jit(jax.grad(trained, argnums=(0, 1)))(*at)
    for index, slope in enumerate(gradient):
        moved = [[x + sign * step * (i == index) for i, x in enumerate(at)] for sign in (1, -1)]
        difference = (float(trained(*moved[0])) - float(trained(*moved[1]))) / (2 * step)
        np.testing.assert_allclose(float(slope), difference, rtol=0.05, atol=2e-3)


@pytest.mark.contract
@over(case for case in OPTIMIZERS if case.name in ("rf_rmsprop", "published_rf_adamw", "published_sirf_shampoo"))
def test_derivatives_pass_the_rounding_of_half_precision(case: Case) -> None:
    dtype = (
        {"nu_dtype": jnp.bfloat16} if case.diagonal else {"layout": rf.Layout(diagonal=None, factor_dtype=jnp.bfloat16)}
    )
    at = (jnp.float32(0.0), jnp.float32(1.0))
    wide, half = (jax.jit(jax.grad(after_three_steps(case, **given), (0, 1)))(*at) for given in ({}, dtype))
    for of_wide, of_half in zip(wide, half, strict=True):
        assert abs(of_wide) > 1e-5
        np.testing.assert_allclose(of_half, of_wide, rtol=0.1)

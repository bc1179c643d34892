"""What the tests of the two Kronecker transformations share."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rootfree_optax as rf

SETTING = {"preconditioner_lr": 0.3, "damping": 0.1, "batch_size": 4}
# How the official code does what this library does otherwise by default.
PUBLISHED = {"refresh": "published", "initial_scale": 1.0}
PUBLISHED_MOMENTUM = {"momentum_of": "directions", "nesterov": False}


def scale_by_published(preconditioner_lr=0.2, damping=1e-4, riemannian_momentum=0.5, **others):
    return rf.scale_by_sirf_shampoo(preconditioner_lr, damping, riemannian_momentum, **{**PUBLISHED, **others})


EXACT_SETTING = {"preconditioner_lr": 0.1, "damping": 0.01, "batch_size": 4}


def scale_by_exact(**changes):
    """Returns the exact refresh from a curvature of one on, unless `changes` say otherwise."""
    return rf.scale_by_sirf_shampoo(**{**EXACT_SETTING, "refresh": "exact", "initial_scale": 1.0, **changes})


def sirf_published(*args, preconditioner_lr=0.2, riemannian_momentum=0.5, **others):
    given = {"preconditioner_lr": preconditioner_lr, "riemannian_momentum": riemannian_momentum, **others}
    return rf.sirf_shampoo(*args, **{**PUBLISHED, **PUBLISHED_MOMENTUM, **given})


both_forms = pytest.mark.parametrize("make", [scale_by_published, rf.scale_by_rf_shampoo])


def draw(shapes, steps=3, seed=0):
    """Returns a tree of gradients, with a leading axis of steps."""
    rng = np.random.default_rng(seed)
    draw_one = lambda shape: np.float32(rng.standard_normal((steps, *shape)))
    return jax.tree.map(draw_one, shapes, is_leaf=lambda node: isinstance(node, tuple))


def run(tx: optax.GradientTransformationExtraArgs, gradients: Any) -> tuple[Any, Any]:
    """Returns the directions of all steps, and the states after each, with a leading axis of steps."""

    @jax.jit
    def steps(gradients):
        params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)

        def step(state, gradient):
            direction, state = tx.update(gradient, state, params)
            return state, (direction, state)

        return jax.lax.scan(step, tx.init(params), gradients)[1]

    return jax.device_get(steps(gradients))


def last(history):
    return jax.tree.map(lambda leaf: leaf[-1], history)


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def params_of(gradients):
    return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients)

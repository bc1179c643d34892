"""What the tests of the Kronecker transformation and of its rules share."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import whole

import rootfree_optax as rf

SETTING = {"preconditioner_lr": 0.3, "damping": 0.1, "batch_size": 4}

scale_by_published, sirf_published = rf.published.scale_by_sirf_shampoo, rf.published.sirf_shampoo
both_forms = pytest.mark.parametrize("make", [scale_by_published, rf.published.scale_by_rf_shampoo])


def draw(shapes: Any, steps: int = 3, seed: int = 0) -> Any:
    """Returns a tree of gradients, with a leading axis of steps."""
    rng = np.random.default_rng(seed)
    draw_one = lambda shape: np.float32(rng.standard_normal((steps, *shape)))
    return jax.tree.map(draw_one, shapes, is_leaf=lambda node: isinstance(node, tuple))


def compile_run(make: Callable[..., optax.GradientTransformationExtraArgs]) -> Callable[..., tuple[Any, Any]]:
    """Returns a compiled function `(gradients, *numbers)` like `run`, of `make(*numbers)`: one for many numbers."""

    @jax.jit
    def steps(gradients: Any, *numbers: Any) -> tuple[Any, Any]:
        tx = make(*numbers)
        params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)

        def step(state: Any, gradient: Any) -> tuple[Any, tuple[Any, Any]]:
            direction, state = tx.update(gradient, state, params)
            return state, (direction, state)

        return jax.lax.scan(step, tx.init(params), gradients)[1]

    return lambda *arguments: jax.device_get(steps(*arguments))


def run(tx: optax.GradientTransformationExtraArgs, gradients: Any) -> tuple[Any, Any]:
    """Returns the directions of all steps, and the states after each, with a leading axis of steps."""
    return compile_run(lambda: tx)(gradients)


def last(history: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[-1], history)


def params_of(gradients: Any) -> Any:
    return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients)


def factors_of(state: rf.ScaleByKroneckerState) -> list[Any]:
    """Returns the parts of each stack's factors."""
    return [stack.block.factors for stack in state.stacks]


def with_factors(state: rf.ScaleByKroneckerState, factors: Any) -> rf.ScaleByKroneckerState:
    """Returns a state with other factors, the parts of each stack's."""
    pairs = zip(state.stacks, factors, strict=True)
    return state._replace(stacks=tuple(s._replace(block=s.block._replace(factors=tuple(f))) for s, f in pairs))


def dense_factors(state: Any, params: Any, layout: rf.Layout | None = None) -> dict[str, tuple[np.ndarray, ...]]:
    """Returns what `rf.factors` reads from a state that is of NumPy arrays."""
    return jax.device_get(rf.factors(jax.tree.map(jnp.asarray, state), params, layout or whole()))


def assert_close(actual: Any, expected: Any) -> None:
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)

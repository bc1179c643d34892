"""Every whole optimizer finds the minimum of small problems; complex parameters turn with their phases.

Optax's own suites have the same problems: where its wheel ships them, see test_optax_suites.py, ours are
skipped.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, make_gradients, make_params, refuses, run
from contract import ALL, OPTIMIZERS, Case, over, tolerance_of


def squared_distance(params: Any, minimum: Any) -> jax.Array:
    return sum(jnp.sum((p - m) ** 2) for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(minimum), strict=True))


def rosenbrock(params: jax.Array, minimum: jax.Array) -> jax.Array:
    x, y = params
    return (minimum[0] - x) ** 2 + 100 * (y - x**2) ** 2


MATRIX = [[3.0, -2.0, 0.5], [1.0, 4.0, -1.0]]
PROBLEMS = {
    "parabola": (squared_distance, [-1.0, 10.0, 1.0], [1.0, -1.0, 1.0]),
    "rosenbrock": (rosenbrock, [0.0, 0.0], [1.0, 1.0]),
    "matrix": (squared_distance, np.zeros((2, 3)), MATRIX),
    "mixed": (
        squared_distance,
        {"scalar": 0.0, "vector": np.zeros(3), "tensor": np.ones((2, 1, 3))},
        {"scalar": -1.0, "vector": [1.0, -1.0, 2.0], "tensor": np.reshape(MATRIX, (2, 1, 3))},
    ),
}


SHIPPED = (pathlib.Path(optax.__file__).parent / "_src" / "alias_test.py").exists()


@pytest.mark.skipif(SHIPPED, reason="Optax's own suites have these problems")
@over(OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_converges(case: Case, problem: str) -> None:
    objective: Callable[[Any, Any], jax.Array]
    objective, start, end = PROBLEMS[problem]
    is_array = lambda node: isinstance(node, list)
    start, end = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree, is_leaf=is_array) for tree in (start, end))
    tx = case()

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params, end), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=20_000)
    for p, e in zip(jax.tree.leaves(params), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(p, e, rtol=0, atol=3e-2)


@pytest.mark.contract
@over(ALL)
def test_complex_parameters_are_refused_by_path_or_turn_with_their_phases(case: Case) -> None:
    """What is preconditioned by |g|² commutes with a rotation of every entry in the complex plane."""
    params = make_params()
    if not case.diagonal:
        with refuses(TypeError, "complex", "layer/"):
            case().init(jax.tree.map(lambda p: p.astype(jnp.complex64), params))
        return
    gradients = make_gradients(params, 3)
    phases = jax.tree.map(lambda g: jnp.exp(1j * g.astype(jnp.complex64)), gradients[0])
    turned = lambda tree: jax.tree.map(lambda leaf, phase: leaf.astype(jnp.complex64) * phase, tree, phases)
    expected, _ = run(case(), params, gradients)
    history, _ = run(case(), turned(params), [turned(gradient) for gradient in gradients])
    assert_close(history, [turned(updates) for updates in expected], tolerance_of(case))

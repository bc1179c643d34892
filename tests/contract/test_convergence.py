"""Every whole optimizer finds the minimum of small problems; complex parameters follow NumPy or are refused.

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
from checks import make_gradients, make_params, refuses, run
from contract import ALL, OPTIMIZERS, Case, over, tolerance_of

import rootfree_optax as rf


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


def numpy_updates(
    settings: dict[str, Any], param: np.ndarray, gradients: list[np.ndarray], *, is_coupled: bool
) -> list[np.ndarray]:
    """Returns the updates of a diagonal method on complex arrays, in double precision.

    Args:
      settings: the hyperparameters that the method has.
      param: the parameter.
      gradients: of each step.
      is_coupled: whether weight decay enters the momentum.
    """
    b1, decay = settings.get("b1", 0.0), settings.get("b2", settings.get("decay"))
    s, m, v = np.ones(param.shape), np.zeros_like(param), np.zeros_like(param)
    history = []
    s = s * settings.get("initial_scale", 1.0)
    for t, g in enumerate(gradients, start=1):
        s = decay * s + (1 - decay) * settings["batch_size"] * (g.real**2 + g.imag**2)
        m = b1 * m + (1 - b1) * g
        correction = [1 - b1**t, 1 - decay**t] if settings.get("bias_correction") else [1, 1]
        direction = m / correction[0] / (s / correction[1] + settings["damping"])
        weight_decay = settings.get("weight_decay", 0.0) * param
        v = settings.get("momentum", 0.0) * v + direction + is_coupled * weight_decay
        update = v + (1 - is_coupled) * weight_decay
        update = -settings["learning_rate"] * update if "learning_rate" in settings else update
        param = param + update
        history.append(update)
    return history


@over(ALL)
def test_complex_parameters_follow_numpy_or_are_refused_by_path(case: Case) -> None:
    params = jax.tree.map(lambda p: p * (1 - 0.5j), make_params("complex64"))
    if not case.elementwise:
        with refuses(TypeError, "complex", "layer/"):
            case().init(params)
        return
    gradients = make_gradients(params, 3)
    values = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "decay": 0.9, "damping": 0.1, "momentum": 0.7}
    values |= {"weight_decay": 0.2, "batch_size": 4}
    values = {name: value for name, value in values.items() if name in case.numeric}
    history, _ = run(case(**values), params, gradients)

    kernel = lambda tree: np.asarray(tree["layer"]["kernel"]).astype(np.complex128)
    expected = numpy_updates(
        {**case.settings, **values},
        kernel(params),
        [kernel(g) for g in gradients],
        is_coupled=case.make is rf.published.rf_rmsprop,
    )
    for updates, wanted in zip(history, expected, strict=True):
        assert updates["layer"]["kernel"].dtype == jnp.complex64
        np.testing.assert_allclose(kernel(updates), wanted, rtol=0, atol=tolerance_of(case) * np.max(np.abs(wanted)))

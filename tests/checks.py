"""What tests share: small trees, runs of an optimizer, comparisons and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rootfree_optax._src.transforms.origin import Origin


def in_contract(*values: Any) -> Any:
    """Returns a test's parameters, which `pytest -m contract` runs, and the default suite does not."""
    return pytest.param(*values, marks=pytest.mark.contract)


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns parameters with a matrix, a vector and a scalar."""
    rng = np.random.default_rng(1)
    return {
        "layer": {
            "kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype),
            "bias": jnp.asarray(rng.normal(size=3), dtype),
        },
        "scale": jnp.asarray(rng.normal(), dtype),
    }


def make_gradients(params: Any, steps: int, dtype: Any = None) -> list[Any]:
    """Returns the gradients of several steps, trees like `params`, of `dtype` or each parameter's own."""
    rng = np.random.default_rng(2)

    def draw(param: jax.Array) -> jax.Array:
        real, imaginary = rng.normal(size=(2, *param.shape))
        of_dtype = param.dtype if dtype is None else jnp.dtype(dtype)
        is_complex = jnp.issubdtype(of_dtype, jnp.complexfloating)
        return jnp.asarray(real + 1j * imaginary if is_complex else real, dtype=of_dtype)

    return [jax.tree.map(draw, params) for _ in range(steps)]


def run(tx: optax.GradientTransformationExtraArgs, params: Any, gradients: Any, **extra_args: Any) -> tuple[Any, Any]:
    """Returns the updates of every step, as a list, and the last state.

    Updates are jitted: calls with one transformation, such as a case of the contract, share their programs.
    """
    update = jax.jit(tx.update)
    state = tx.init(params)
    history = []
    for gradient in gradients:
        updates, state = update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state


def scan(tx: optax.GradientTransformationExtraArgs, params: Any, gradients: Any) -> tuple[Any, Any]:
    """Returns what `run` does, from one program for all steps: for a transformation of traced numbers."""

    def step(carry: Any, gradient: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    (_, state), history = jax.lax.scan(step, (params, tx.init(params)), stacked)
    return [jax.tree.map(lambda leaf, t=t: leaf[t], history) for t in range(len(gradients))], state


def types(tree: Any) -> Any:
    """Returns the type of every array: shape, dtype, weak type and, on an explicit mesh, sharding."""
    return jax.tree.map(lambda leaf: (jax.typeof(leaf), leaf.weak_type), tree)


def shapes_and_dtypes(tree: Any) -> Any:
    """Returns the tree with each array replaced by its shape and dtype."""
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)


def without_origins(state: Any) -> Any:
    """Returns a state without what says which optimizer and parameters it belongs to."""
    is_origin = lambda node: isinstance(node, Origin)
    return jax.tree.map(lambda node: None if is_origin(node) else node, state, is_leaf=is_origin)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Asserts that two trees agree in structure, shapes and dtypes, and entries to `tolerance` of the array's largest.

    A tolerance of zero demands equal bits.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert shapes_and_dtypes(actual) == shapes_and_dtypes(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        wide = np.complex128 if jnp.iscomplexobj(a) else np.float64
        a, e = np.asarray(a).astype(wide), np.asarray(e).astype(wide)
        largest = np.max(np.abs(e), initial=0.0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


def refuses(error: type[Exception], *fragments: str) -> Any:
    """Expects an error whose message has all of the fragments."""
    return pytest.raises(error, check=lambda e: all(fragment in str(e) for fragment in fragments))

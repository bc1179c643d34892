"""Trees at their edges: None leaves, empty trees, scalars, empty arrays, wrong trees; gradients that are not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, in_contract, make_gradients, make_params, refuses, run, types
from contract import ALL, Case, over, tolerance_alone, tolerance_of


def leaves_under(state: Any, name: str) -> list[jax.Array]:
    """Returns the state's leaves that belong to the parameters under `name`."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if name in jax.tree_util.keystr(path)]


@over(ALL, wiring=True)
def test_a_parameter_of_none_is_left_out(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 2)
    expected, expected_state = run(case(), params, gradients)
    history, state = run(case(), {**params, "none": None}, [{**g, "none": None} for g in gradients])
    assert all(updates["none"] is None for updates in history)
    assert_close([{**updates, "none": None} for updates in expected], history, tolerance_alone(case))
    assert_close(jax.tree.leaves(state), jax.tree.leaves(expected_state), tolerance_alone(case))


@over(ALL, wiring=True)
def test_a_gradient_of_none_gives_no_update_and_leaves_its_state(case: Case) -> None:
    params = make_params()
    first, second = make_gradients(params, 2)
    tx = case()
    update = jax.jit(tx.update)
    _, state = update(first, tx.init(params), params)
    updates, after = update({**second, "scale": None}, state, params)
    assert updates["scale"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert_close(leaves_under(after, "scale"), leaves_under(state, "scale"), tolerance=0)

    expected, expected_after = update(second, state, params)
    assert_close(updates["layer"], expected["layer"], tolerance_alone(case))
    assert_close(leaves_under(after, "layer"), leaves_under(expected_after, "layer"), tolerance_alone(case))
    if case.diagonal:
        assert len(leaves_under(after, "layer")) == 2 * len(leaves_under(after, "scale")) > 0


@over(ALL, wiring=True)
@pytest.mark.parametrize("empty", [{}, (), [], {"layer": {}}], ids=str)
def test_an_empty_tree(case: Case, empty: Any) -> None:
    tx = case()
    state = tx.init(empty)
    updates, after = jax.jit(tx.update)(empty, state, empty)
    assert updates == empty
    assert jax.tree.structure(after) == jax.tree.structure(state)


@over(ALL, wiring=True)
def test_scalars_and_empty_arrays_are_parameters_like_any_other(case: Case) -> None:
    params = {"scalar": jnp.asarray(2.0, jnp.float32), "empty": jnp.zeros((0, 3)), "vector": jnp.ones(1)}
    gradients = make_gradients(params, 2)
    history, _ = run(case(), params, gradients)
    for updates in history:
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    for name in ("scalar", "vector"):
        alone, _ = run(case(), params[name], [g[name] for g in gradients])
        assert_close([updates[name] for updates in history], alone, tolerance_alone(case))
    as_vector, _ = run(case(), params["scalar"][None], [g["scalar"][None] for g in gradients])
    assert_close([updates["scalar"][None] for updates in history], as_vector)


@over(ALL, wiring=True)
def test_numpy_parameters_and_gradients(case: Case) -> None:
    params = make_params()
    (gradient,) = make_gradients(params, 1)
    tx = case()
    state = tx.init(params)
    expected = tx.update(gradient, state, params)
    assert types(expected[1]) == types(state)
    arrays, numpy_gradient = jax.tree.map(np.asarray, (params, gradient))
    actual = tx.update(numpy_gradient, tx.init(arrays), arrays)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(actual))
    assert_close(actual, expected, tolerance=0)


@over(ALL, wiring=True)
@pytest.mark.parametrize("dtype", ["int32", "bool", "float8_e4m3fn"])
def test_parameters_that_are_not_floating_point_are_refused_by_path(case: Case, dtype: str) -> None:
    params = make_params()
    params["layer"]["steps"] = jnp.zeros(2, dtype)
    for init in (case().init, jax.jit(case().init)):
        with refuses(TypeError, "'layer/steps'", dtype, "floating point", "optax.masked"):
            init(params)


@over(ALL, wiring=True)
def test_a_model_may_hold_functions_and_nothing_where_there_is_no_gradient(case: Case) -> None:
    """As `update` is given an Equinox model; `init` takes its arrays, and says so."""
    params = make_params()
    gradients = make_gradients(params, 2)
    other = {"activation": jax.nn.relu, "steps": jnp.zeros(2, jnp.int32), "name": "mlp"}
    with refuses(TypeError, "'other/activation'", "eqx.filter", "optax.masked"):
        case().init({**params, "other": {"activation": jax.nn.relu}})
    tx, empty = case(), dict.fromkeys(other)
    expected, _ = run(tx, params, gradients)
    state = tx.init({**params, "other": empty})
    update = jax.jit(lambda gradient, state, params: tx.update(gradient, state, {**params, "other": other}))
    for gradient, wanted in zip(gradients, expected, strict=True):
        updates, state = update({**gradient, "other": empty}, state, params)
        params = jax.tree.map(jnp.add, params, wanted)
        assert_close(updates, {**wanted, "other": empty}, tolerance_alone(case))


@over(ALL, wiring=True)
def test_python_numbers_are_parameters_and_gradients(case: Case) -> None:
    # Of full rank: of a matrix of ones a spectral step would find directions in rounding errors.
    w = make_params()["layer"]["kernel"]
    params, gradient = {"w": w, "t": 0.5}, {"w": w, "t": 2.0}
    arrays = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    expected, _ = run(case(), arrays(params), [arrays(gradient)])
    for update in (case().update, jax.jit(case().update)):
        updates, _ = update(gradient, case().init(params), params)
        assert_close(arrays(updates), expected[0], tolerance_of(case))


@over(ALL, wiring=True)
def test_a_gradient_of_none_makes_no_nan(case: Case) -> None:
    params = make_params()
    gradient = {"layer": {**params["layer"], "kernel": None}, "scale": params["scale"]}
    with jax.debug_nans(True):
        for update in (case().update, jax.jit(case().update)):
            state = case().init(params)
            for _ in range(2):
                updates, state = update(gradient, state, params)
            assert updates["layer"]["kernel"] is None


@over(ALL, wiring=True)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_gradients_unlike_the_parameters_are_refused_by_path(case: Case, jitted: bool) -> None:
    params = make_params()
    (gradient,) = make_gradients(params, 1)
    tx = case()
    state = tx.init(params)
    update = jax.jit(tx.update) if jitted else tx.update
    layer = gradient["layer"]
    with refuses(ValueError, "gradients", "'layer/bias'", "missing"):
        update({**gradient, "layer": {"kernel": layer["kernel"]}}, state, params)
    with refuses(ValueError, "gradients", "'layer/extra'"):
        update({**gradient, "layer": {**layer, "extra": jnp.ones(2)}}, state, params)
    with refuses(ValueError, "gradients", "'layer/kernel'", "(3, 4)", "(4, 3)"):
        update({**gradient, "layer": {**layer, "kernel": layer["kernel"].T}}, state, params)


@over(ALL, wiring=True)
@pytest.mark.parametrize("dtype", ["float32", in_contract("bfloat16")])
def test_bad_entries_never_poison_the_state(case: Case, dtype: str) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params, 3)
    update = jax.jit(case().update)

    def directions(gradients: list[Any]) -> tuple[list[Any], Any]:
        """At one point: applied, an update that is not finite would poison the parameters."""
        state, history = case().init(params), []
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            history.append(updates)
        return history, state

    bad = {"kernel": [((1, 2), jnp.nan), ((0, 0), jnp.inf), ((3, 1), -jnp.inf)], "bias": [((1,), 1e20)]}
    layer = dict(gradients[1]["layer"])
    for name, entries in bad.items():
        for index, value in entries:
            layer[name] = layer[name].at[index].set(value)
    expected, _ = directions(gradients)
    actual, state = directions([gradients[0], {**gradients[1], "layer": layer}, gradients[2]])

    # The square of a large direction, which is kept to be logged, may overflow.
    kept = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "squared_norm" not in jax.tree_util.keystr(path)
    ]
    assert all(np.all(jnp.isfinite(leaf)) for leaf in (*kept, *jax.tree.leaves(actual[2])))
    for name, entries in bad.items():
        for index, value in entries:
            assert bool(jnp.isfinite(actual[1]["layer"][name][index])) == np.isfinite(value)
    assert_close([u["scale"] for u in actual], [u["scale"] for u in expected], tolerance_alone(case, dtype))
    if case.elementwise:
        for name, entries in bad.items():
            for updates in (*actual, *expected):
                for index, _ in entries:
                    updates["layer"][name] = updates["layer"][name].at[index].set(0)
        assert_close(actual, expected, tolerance=0)


@over(ALL, wiring=True)
@pytest.mark.parametrize("dtype", [in_contract("float16"), "float32"])
def test_training_goes_on_after_thousands_of_zero_gradients(case: Case, dtype: str) -> None:
    params = make_params(dtype)
    (gradient,) = make_gradients(params, 1)
    zero = jax.tree.map(jnp.zeros_like, params)
    update, state = jax.jit(case().update), case().init(params)
    for _ in range(2000):
        quiet, state = update(zero, state, zero)
    assert all(np.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert_close(quiet, zero, tolerance=0)
    updates, state = update(jax.tree.map(lambda g: g * 1e-2, gradient), state, params)
    assert all(np.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))

"""The state: arrays whose types never change, whatever the dtypes; compiled once, donated, mapped, abstract."""

import contextlib
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, in_contract, make_gradients, make_params, run, shapes_and_dtypes, types
from contract import ALL, Case, over, tolerance_alone, tolerance_of
from double_precision import double_precision


def uncommitted_copy(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


REMAINING = (("float16", False), ("float32", False), ("float32", True), ("float64", True))


@over(ALL, wiring=True)
@pytest.mark.parametrize(
    ("dtype", "x64"),
    [
        ("bfloat16", False),
        *(in_contract(*given) for given in REMAINING),
    ],
)
def test_types_are_stable_through_cond_and_scan(case: Case, dtype: str, x64: bool) -> None:
    with double_precision() if x64 else contextlib.nullcontext():
        tx = case()
        params = {**make_params(dtype), "weak": jnp.asarray(1.0)}
        assert params["weak"].weak_type
        (gradient,) = make_gradients(params, 1)
        state = tx.init(params)

        def step(carry: Any, take: jax.Array) -> Any:
            update = lambda: tx.update(gradient, carry, params)
            skip = lambda: (gradient, carry)
            assert types(jax.eval_shape(update)[1]) == types(carry)
            updates, carry = jax.lax.cond(take, update, skip)
            return carry, updates

        # Tracing is what fails where a type changes; nothing needs to be compiled.
        last, updates = jax.eval_shape(lambda carry: jax.lax.scan(step, carry, jnp.array([True, False])), state)
        assert types(last) == types(state)
        assert [u.dtype for u in jax.tree.leaves(updates)] == [g.dtype for g in jax.tree.leaves(gradient)]


@over(ALL, wiring=True)
def test_types_are_stable_in_eager_mode(case: Case) -> None:
    """Single precision besides, see `test_numpy_parameters_and_gradients`."""
    tx = case()
    params = {"half": jnp.ones((2, 3), jnp.bfloat16), "weak": jnp.asarray(1.0)}
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    assert types(after) == types(state)
    assert shapes_and_dtypes(updates) == shapes_and_dtypes(params)


@over(ALL, wiring=True)
def test_state_leaves_are_arrays_of_their_own(case: Case) -> None:
    params = make_params()
    before = jax.tree.leaves(case().init(params))
    _, after = run(case(), params, make_gradients(params, 1))
    assert before
    for leaf in (*before, *jax.tree.leaves(after)):
        assert isinstance(leaf, jax.Array)
        assert not any(leaf is param for param in jax.tree.leaves(params))


@over(ALL, wiring=True)
@pytest.mark.parametrize(
    ("param", "gradient"),
    [("bfloat16", "float32"), in_contract("float32", "bfloat16")],
)
def test_updates_have_the_gradients_dtype_or_a_wider_one_of_the_parameters(
    case: Case, param: str, gradient: str
) -> None:
    tx = case()
    params = make_params(param)
    (gradients,) = make_gradients(params, 1, gradient)
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    wider = gradients if case.name.startswith("scale_by") else make_params("float32")
    assert shapes_and_dtypes(updates) == shapes_and_dtypes(wider)
    assert types(after) == types(state)


@pytest.mark.contract
@over(case for case in ALL if not case.is_staggered)
def test_each_leaf_of_a_mixed_tree_is_updated_as_if_alone(case: Case) -> None:
    dtypes = ["float16", "bfloat16", "float32", *(["complex64"] if case.diagonal else [])]
    params = {dtype: make_params(dtype)["layer"] for dtype in dtypes}
    gradients = make_gradients(params, 2)
    together, _ = run(case(), params, gradients)
    for dtype in dtypes:
        alone, _ = run(case(), params[dtype], [g[dtype] for g in gradients])
        assert_close([updates[dtype] for updates in together], alone, tolerance_alone(case, dtype))


@over(ALL, wiring=True)
def test_unknown_extra_arguments_are_ignored(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 2)
    expected = run(case(), params, gradients)
    extra = {"value": jnp.float32(3), "grad_fn": None, "an_argument_of_another_link": "text"}
    with_extra = optax.GradientTransformationExtraArgs(case().init, functools.partial(case().update, **extra))
    assert_close(run(with_extra, params, gradients), expected, tolerance=0)


@over(ALL, wiring=True)
def test_the_gradient_as_explicit_curvature_changes_nothing(case: Case) -> None:
    params = make_params()
    (gradient,) = make_gradients(params, 1)
    update = jax.jit(case().update)
    state = case().init(params)
    expected = update(gradient, state, params)
    assert_close(update(gradient, state, params, curvature=gradient), expected, tolerance_of(case))
    samples = jax.tree.map(lambda g: jnp.stack([g, -g, g]), gradient)
    assert_close(update(gradient, state, params, curvature=samples), expected, tolerance_of(case))
    other, _ = update(gradient, state, params, curvature=jax.tree.map(lambda g: 2 * g, gradient))
    assert np.any(np.abs(other["layer"]["kernel"] - expected[0]["layer"]["kernel"]) > 0)


@over(ALL, having="batch_size", wiring=True)
def test_compiled_once_whatever_the_batch_size(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    tx = case(batch_size=None)
    params = make_params()
    (gradient,) = make_gradients(params, 1)

    @jax.jit
    def step(params: Any, state: Any, batch_size: Any) -> Any:
        updates, state = tx.update(gradient, state, params, batch_size=batch_size)
        return optax.apply_updates(params, updates), state

    def compilations(batch_size: int) -> int:
        nonlocal params, state
        caplog.clear()
        with jax.log_compiles():
            params, state = step(params, state, batch_size)
        return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    state = tx.init(params)
    assert [compilations(batch_size) for batch_size in (32, 32, 48)] == [1, 0, 0]


@over(ALL, wiring=True)
def test_parameters_and_state_can_be_donated(case: Case) -> None:
    tx = case()
    params = uncommitted_copy(make_params())
    state = tx.init(params)
    (gradient,) = make_gradients(params, 1)

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            before = jax.tree.leaves((params, state))
            params, state = donating(params, state)
            assert all(leaf.is_deleted() for leaf in before)


@over(ALL, wiring=True)
def test_tree_map_params_reaches_the_parameter_like_state(case: Case) -> None:
    tx = case()
    params = make_params()
    state = tx.init(params)
    assert_close(optax.tree.map_params(tx, lambda leaf: leaf, state), state, tolerance=0)

    reached = []
    optax.tree.map_params(tx, lambda leaf, param: reached.append((leaf, param)), state, params)
    assert all(leaf.shape == param.shape for leaf, param in reached)
    assert {id(leaf) for leaf, _ in reached} <= {id(leaf) for leaf in jax.tree.leaves(state)}
    if case.diagonal:
        counts = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.integer)]
        assert len(reached) == len(jax.tree.leaves(state)) - len(counts) > 0


@over(ALL)
def test_init_is_the_same_jitted_and_abstract(case: Case) -> None:
    tx = case()
    params = {**make_params(), "half": jnp.ones((2, 3), jnp.float16)}
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = tx.init(params)
    assert all(leaf.size for leaf in jax.tree.leaves(state))  # Orbax saves no empty arrays
    assert_close(jax.jit(tx.init)(params), state, tolerance=0)
    assert types(jax.jit(tx.init)(params)) == types(state)
    for shapes in (jax.eval_shape(tx.init, params), jax.eval_shape(tx.init, abstract)):
        assert shapes_and_dtypes(shapes) == shapes_and_dtypes(state)
    from_shapes = tx.init(abstract)
    assert jax.tree.structure(from_shapes) == jax.tree.structure(state)
    assert shapes_and_dtypes(from_shapes) == shapes_and_dtypes(state)

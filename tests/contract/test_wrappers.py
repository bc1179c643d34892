"""Inside Optax's wrappers: MultiSteps, masked, partition, apply_if_finite, and the mask of weight decay."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, make_gradients, make_params, refuses, run, without_origins
from contract import ALL, CONSTRUCTORS, OPTIMIZERS, Case, over, tolerance_alone, tolerance_of
from flax import nnx
from flax.training.train_state import TrainState


def loss(params: Any, inputs: jax.Array) -> jax.Array:
    return jnp.mean((params["scale"] * (inputs @ params["layer"]["kernel"] + params["layer"]["bias"][None])) ** 2)


@over(ALL, having="batch_size", wiring=True)
def test_accumulated_micro_batches_equal_one_large_batch(case: Case) -> None:
    """MultiSteps over k batches of b terms is one step on their mean gradient with batch_size=k·b."""
    k, b = 3, 4
    rng = np.random.default_rng(3)
    inputs = jnp.asarray(rng.normal(size=(2, k * b, 4)), jnp.float32)
    tx, large = case(batch_size=k * b), make_params()
    accumulating, small = optax.MultiSteps(case(batch_size=None), k), make_params()
    state, accumulated = tx.init(large), accumulating.init(small)

    # MultiSteps divides a float32 by an int32, so it needs jax's standard promotion.
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(tx.update)
        accumulate = jax.jit(functools.partial(accumulating.update, batch_size=k * b))
        for batch in inputs:
            expected, state = update(jax.grad(loss)(large, batch), state, large)
            large = optax.apply_updates(large, expected)
            for i, micro in enumerate(batch.reshape(k, b, -1)):
                updates, accumulated = accumulate(jax.grad(loss)(small, micro), accumulated, small)
                small = optax.apply_updates(small, updates)
                assert bool(jnp.any(updates["scale"] != 0)) == (i == k - 1)
            assert_close(updates, expected, tolerance_of(case))
            assert_close(accumulated.inner_opt_state, state, tolerance_of(case))


@over(ALL, having="batch_size", wiring=True)
def test_masked_and_partition_equal_the_subtree_alone(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 2)
    tx = case(batch_size=None)
    alone, alone_state = run(tx, params["layer"], [g["layer"] for g in gradients], batch_size=8)
    scale_alone = [g["scale"] for g in gradients]

    masked, masked_state = run(optax.masked(tx, {"layer": True, "scale": False}), params, gradients, batch_size=8)
    expected = [{"layer": layer, "scale": scale} for layer, scale in zip(alone, scale_alone, strict=True)]
    assert_close(masked, expected, tolerance_alone(case))
    masked_arrays, alone_arrays = (jax.tree.leaves(without_origins(s)) for s in (masked_state, alone_state))
    assert_close(masked_arrays, alone_arrays, tolerance_alone(case))

    partition = optax.partition({"ours": tx, "sgd": optax.sgd(0.5)}, {"layer": "ours", "scale": "sgd"})
    partitioned, _ = run(partition, params, gradients, batch_size=8)
    expected = [{"layer": layer, "scale": -0.5 * scale} for layer, scale in zip(alone, scale_alone, strict=True)]
    assert_close(partitioned, expected, tolerance=1e-6)


@over(ALL, wiring=True)
@pytest.mark.usefixtures("standard_promotion")
def test_inside_lookahead_which_passes_no_extra_arguments_on(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 2)
    expected, _ = run(case(), params, gradients)
    looking = optax.lookahead(case(), 3, 0.5)
    both = optax.LookaheadParams.init_synced(params)
    state, update = looking.init(both), jax.jit(looking.update)
    for gradient, wanted in zip(gradients, expected, strict=True):
        updates, state = update(gradient, state, both)
        both = optax.apply_updates(both, updates)
        assert_close(updates.fast, wanted, tolerance_of(case))


@over(OPTIMIZERS, wiring=True)
@pytest.mark.usefixtures("standard_promotion")
def test_an_nnx_optimizer_boxes_parameters_in_init_alone(case: Case) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    nnx.Optimizer(model, case(), wrt=nnx.Param).update(model, nnx.clone(nnx.state(model, nnx.Param)))
    tx = case()
    updates, _ = tx.update(params, tx.init(params), params)
    assert_close(nnx.as_pure(nnx.state(model, nnx.Param)), optax.apply_updates(params, updates), tolerance_of(case))


@over(OPTIMIZERS, having="batch_size", wiring=True)
@pytest.mark.usefixtures("standard_promotion")
def test_a_flax_train_state_has_a_batch_size_for_each_step(case: Case) -> None:
    """`apply_gradients` passes no arguments on to `update`: the batch size is part of the state."""
    params = make_params()
    gradients = make_gradients(params, 2)
    tx = optax.inject_hyperparams(case.make, static_args=case.static)(**{**case.settings, "batch_size": 4})
    train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state, gradient: state.apply_gradients(grads=gradient))
    update, expected, state = jax.jit(case().update), params, case().init(params)
    for batch_size, gradient in zip((4.0, 6.0), gradients, strict=True):
        train_state.opt_state.hyperparams["batch_size"] = jnp.float32(batch_size)
        train_state = step(train_state, gradient)
        updates, state = update(gradient, state, expected, batch_size=batch_size)
        expected = optax.apply_updates(expected, updates)
        assert_close(train_state.params, expected, tolerance_of(case))


@over(ALL, having="batch_size", wiring=True)
def test_the_gradient_of_a_sum_is_scaled_to_that_of_a_mean(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 2)
    expected, _ = run(case(batch_size=16), params, gradients)
    of_sum = optax.chain(optax.scale(1 / 16), case(batch_size=16))
    actual, _ = run(of_sum, params, jax.tree.map(lambda g: 16 * g, gradients))
    assert_close(actual, expected, tolerance_of(case))


@over(ALL, wiring=True)
def test_integer_parameters_can_be_masked_away(case: Case) -> None:
    params = {**make_params(), "steps": jnp.zeros(2, jnp.int32)}
    tx = optax.masked(case(), lambda p: jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), p))
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    assert updates["steps"].dtype == jnp.int32


@over(OPTIMIZERS, having="mask", wiring=True)
@pytest.mark.parametrize("make_mask", [lambda mask: mask, lambda mask: lambda _: mask], ids=["tree", "callable"])
def test_the_mask_restricts_weight_decay_alone(case: Case, make_mask: Any) -> None:
    params = make_params()
    gradients = make_gradients(params, 2)
    mask = {"layer": {"kernel": True, "bias": False}, "scale": False}
    decayed, _ = run(case(weight_decay=0.5), params, gradients)
    plain, _ = run(case(weight_decay=None), params, gradients)
    masked, _ = run(case(weight_decay=0.5, mask=make_mask(mask)), params, gradients)
    expected = [
        {"layer": {**p["layer"], "kernel": d["layer"]["kernel"]}, "scale": p["scale"]}
        for d, p in zip(decayed, plain, strict=True)
    ]
    assert_close(masked, expected, tolerance=1e-6)
    assert np.all(decayed[0]["layer"]["bias"] != plain[0]["layer"]["bias"])


@over(CONSTRUCTORS, having="weight_decay")
def test_weight_decay_without_parameters_is_refused(case: Case) -> None:
    params = make_params()
    tx = case(weight_decay=0.5)
    with refuses(ValueError, "weight decay", "params"):
        jax.eval_shape(tx.update, params, tx.init(params))


@over(ALL, wiring=True)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf], ids=str)
def test_apply_if_finite_rejects_the_step_and_training_goes_on(case: Case, value: float) -> None:
    params = make_params()
    good, bad, last = make_gradients(params, 3)
    bad["layer"]["kernel"] = bad["layer"]["kernel"].at[0, 0].set(value)
    expected, expected_state = run(case(), params, [good, last])
    guarded = optax.apply_if_finite(case(), 5)
    (first, rejected, second), state = run(guarded, params, [good, bad, last])
    assert_close([first, second], expected, tolerance_of(case))
    assert_close(state.inner_state, expected_state, tolerance_of(case))
    assert_close(rejected, jax.tree.map(jnp.zeros_like, params))
    assert int(state.total_notfinite) == 1

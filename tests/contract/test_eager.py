"""Updates outside `jax.jit`: one program at the first step, none after that, and none that outlives its optimizer."""

import gc
import logging
import weakref

import jax
import optax
import pytest
from checks import assert_close, make_gradients, make_params
from contract import ALL, OPTIMIZERS, REPRESENTATIVES, Case, over, tolerance_of


@over(ALL, wiring=True)
def test_eager_updates_equal_compiled_ones_and_compile_once(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    params = make_params()
    gradients = make_gradients(params, 3)
    tx, compiled = case(), jax.jit(case().update)
    state = expected_state = tx.init(params)
    for step, gradient in enumerate(gradients):
        with jax.log_compiles(step > 0), caplog.at_level(logging.WARNING):
            updates, state = tx.update(gradient, state, params)
        expected, expected_state = compiled(gradient, expected_state, params)
        assert_close((updates, state), (expected, expected_state), tolerance_of(case))
    assert not [record for record in caplog.records if "update" not in record.message and "compil" in record.message]


@over(ALL, having="damping", wiring=True)
def test_other_numbers_need_no_other_program(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Also those of `optax.inject_hyperparams`, which makes the optimizer anew at every step."""
    params = make_params()
    (gradient,) = make_gradients(params, 1)
    injected = optax.inject_hyperparams(case.make, static_args=case.static)(**case.settings)
    state = injected.init(params)
    _, state = injected.update(gradient, state, params)
    state.hyperparams["damping"] = 2 * state.hyperparams["damping"]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        injected.update(gradient, state, params)
    assert not [record.message for record in caplog.records if "XLA compilation" in record.message]


@over(OPTIMIZERS)
def test_an_optimizer_leaves_nothing_behind(case: Case) -> None:
    tx = case.make(**case.settings)
    params = make_params()
    if case.name in REPRESENTATIVES:
        tx.update(params, tx.init(params), params)
    reference = weakref.ref(tx.update)
    del tx
    gc.collect()
    assert reference() is None


@pytest.mark.contract
@over(ALL)
def test_eager_updates_work_without_a_compiler(case: Case) -> None:
    params = make_params()
    expected, _ = jax.jit(case().update)(params, case().init(params), params)
    with jax.disable_jit():
        updates, _ = case().update(params, case().init(params), params)
    assert_close(updates, expected, tolerance_of(case))

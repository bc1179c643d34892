"""Hyperparameters: Python numbers, traced arrays, schedules and injected ones mean the same; bad ones are refused."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, in_contract, make_gradients, make_params, refuses, run, scan, shapes_and_dtypes
from contract import (
    ALL,
    CONSTRUCTORS,
    HYPERPARAMETERS,
    INTERVALS,
    OPTIMIZERS,
    Case,
    numeric_parameters,
    over,
    tolerance_of,
)

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, in_contract(jnp.bfloat16)], ids=["float32", "bfloat16"])
FRACTION = (-0.1, 1.0, 1.5, math.nan)
NON_NEGATIVE = (-1e-3, math.nan, math.inf, np.float32("nan"), np.array(-1))
REFUSED = {
    **dict.fromkeys(("decay", "b1", "b2", "momentum", "riemannian_momentum"), FRACTION),
    **dict.fromkeys(("learning_rate", "preconditioner_lr", "damping", "absolute_damping"), NON_NEGATIVE),
    **dict.fromkeys(("eps", "weight_decay", "initial_scale"), NON_NEGATIVE),
    "statistics_decay": (0, 1.0, math.nan),
    **dict.fromkeys(("batch_size", "trust_radius"), (0, -4, math.nan, math.inf)),
}
# What a configuration file or a data pipeline gives in place of a number.
NO_NUMBERS = ("1e-3", "cosine", [0.5], True, np.True_, 0.5j, np.array([0.5, 0.5]), jnp.ones(1), {})


def first_values(case: Case) -> dict[str, float]:
    return {name: HYPERPARAMETERS[name][0] for name in case.numeric}


def as_arrays(values: dict[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def update_of(case: Case) -> Callable[..., tuple[Any, Any]]:
    """Returns the update as a function of the hyperparameters too, so that one program serves all their values."""
    update = jax.jit(lambda traced, gradient, state, params: case(**traced).update(gradient, state, params))
    return lambda values, *arguments: update(as_arrays(values), *arguments)


@over(case for case in CONSTRUCTORS if case in OPTIMIZERS)
def test_every_numeric_hyperparameter_is_exercised_by_some_variant(case: Case) -> None:
    exercised = {name for other in ALL if other.make is case.make for name in other.numeric}
    assert exercised == set(numeric_parameters(case.make)) <= set(HYPERPARAMETERS)


@over(CONSTRUCTORS)
def test_step_sizes_damping_and_weight_decay_may_be_schedules(case: Case) -> None:
    expected = {"learning_rate", "preconditioner_lr", "damping", "weight_decay", "decay", "b2", "statistics_decay"}
    assert expected & set(case.parameters) <= set(numeric_parameters(case.make, schedule=True))


@over(ALL, wiring=True)
@DTYPES
def test_traced_numbers_equal_python_numbers(case: Case, dtype: Any) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params, 2)
    values = first_values(case)
    expected = run(case(**values), params, gradients)
    actual = jax.jit(lambda traced: scan(case(**traced), params, gradients))(as_arrays(values))
    assert_close(actual, expected, tolerance_of(case, dtype))


@over(ALL, wiring=True)
@DTYPES
def test_schedules_equal_stepwise_constants(case: Case, dtype: Any) -> None:
    params = make_params(dtype)
    gradients = make_gradients(params, 3)
    values = first_values(case)
    slopes = {name: (HYPERPARAMETERS[name][1] - values[name]) / 4 for name in case.schedulable}
    schedules = {name: lambda t, n=name: values[n] + slopes[n] * t.astype(jnp.float32) for name in slopes}
    scheduled, last_state = run(case(**{**values, **schedules}), params, gradients)

    state, update = case(**values).init(params), update_of(case)
    for t, gradient in enumerate(gradients):
        constants = {name: values[name] + slopes[name] * t for name in slopes}
        updates, state = update({**values, **constants}, gradient, state, params)
        params = optax.apply_updates(params, updates)
        assert_close(scheduled[t], updates, tolerance_of(case, dtype))
    assert_close(last_state, state, tolerance_of(case, dtype))


@over(tuple(case for case in ALL if case.unscheduled))
def test_a_schedule_that_a_variant_cannot_follow_is_refused(case: Case) -> None:
    for name in case.unscheduled:
        with refuses(ValueError, name, "schedule"):
            case(**{name: optax.constant_schedule(HYPERPARAMETERS[name][0])})


@over(CONSTRUCTORS)
def test_a_schedule_of_what_may_be_none_is_refused(case: Case) -> None:
    constants = set(numeric_parameters(case.make)) - set(numeric_parameters(case.make, schedule=True))
    for name in constants:
        with refuses(TypeError, name, "inject_hyperparams"):
            case(**{name: optax.constant_schedule(HYPERPARAMETERS[name][0])})


@over(CONSTRUCTORS, having="batch_size", wiring=True)
def test_a_schedule_of_the_batch_size_given_to_update_is_refused(case: Case) -> None:
    params = make_params()
    tx = case()
    with refuses(TypeError, "batch_size", "inject_hyperparams"):
        tx.update(params, tx.init(params), params, batch_size=optax.constant_schedule(4.0))


@over(ALL, wiring=True)
@DTYPES
def test_injected_hyperparameters_equal_constants_and_can_be_changed(case: Case, dtype: Any) -> None:
    params = make_params(dtype)
    first, second = make_gradients(params, 2)
    values = first_values(case)
    injected = optax.inject_hyperparams(case.make, static_args=case.static)(**{**case.settings, **values})
    state = injected.init(params)
    assert set(state.hyperparams) == set(case.numeric)

    update, update_injected = update_of(case), jax.jit(injected.update)
    expected = update(values, first, case(**values).init(params), params)
    actual, state = update_injected(first, state, params)
    assert_close((actual, state.inner_state), expected, tolerance_of(case, dtype))

    for name in case.numeric:
        other = HYPERPARAMETERS[name][1]
        expected, _ = update({**values, name: other}, second, state.inner_state, params)
        changed = {**state.hyperparams, name: jnp.asarray(other, state.hyperparams[name].dtype)}
        actual, _ = update_injected(second, state._replace(hyperparams=changed), params)
        assert_close(actual, expected, tolerance_of(case, dtype))


@pytest.mark.contract
@over(ALL)
def test_each_hyperparameter_has_an_effect(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 4)  # so that there are two refreshes
    values, update = first_values(case), update_of(case)

    def last_update(setting: dict[str, float]) -> np.ndarray:
        point, state = params, case(**setting).init(params)
        for gradient in gradients:
            updates, state = update(setting, gradient, state, point)
            point = optax.apply_updates(point, updates)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)])

    base = last_update(values)
    for name in case.numeric:
        other = last_update({**values, name: HYPERPARAMETERS[name][1]})
        assert np.max(np.abs(other - base)) > 1e-4 * np.max(np.abs(base)), name


@over(ALL, wiring=True)
def test_vmap_over_hyperparameters_equals_a_loop(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 4)
    values = first_values(case)
    settings = [values, *({**values, name: HYPERPARAMETERS[name][1]} for name in case.numeric)]
    of_setting = lambda traced: scan(case(**traced), params, gradients)
    alone = jax.jit(of_setting)
    stacked = {name: jnp.asarray([setting[name] for setting in settings], jnp.float32) for name in values}
    together = jax.jit(jax.vmap(of_setting))(stacked)
    for i, setting in enumerate(settings):
        found = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_close(found, alone(as_arrays(setting)), tolerance_of(case))


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [(case, name, v) for case in CONSTRUCTORS for name in case.parameters for v in REFUSED.get(name, ())],
    ids=lambda argument: argument.name if isinstance(argument, Case) else str(argument),
)
def test_python_numbers_out_of_range_are_refused_at_construction(case: Case, name: str, value: float) -> None:
    with refuses(ValueError, name, str(value)):
        case(**{name: value})


@over(CONSTRUCTORS)
def test_what_is_no_number_is_refused_at_construction_by_name(case: Case) -> None:
    for name in (*numeric_parameters(case.make), *set(INTERVALS) & set(case.parameters)):
        for value in NO_NUMBERS:
            with refuses(TypeError, f"{name} must be", repr(value)):
                case(**{name: value})
    with refuses(TypeError, "0.001 without quotes"):
        case(damping="1e-3")
    for name in {"nesterov", "bias_correction"} & set(case.parameters):
        with refuses(ValueError, name, "'false'"):
            case(**{name: "false"})


@over(CONSTRUCTORS)
def test_numbers_of_numpy_and_arrays_without_axes_are_numbers(case: Case) -> None:
    for make in (np.float32, np.float64, np.array, jnp.asarray):
        # An array of a number without effect would pass for one that inject_hyperparams has traced.
        case(**{name: make(HYPERPARAMETERS[name][0]) for name in case.numeric})
    for make in (int, np.int64, np.array, jnp.asarray):
        case(**{name: make(3) for name in set(INTERVALS) & set(case.parameters)})


@over(CONSTRUCTORS)
def test_numbers_may_be_of_half_precision_as_inject_hyperparams_makes_them(case: Case) -> None:
    params = make_params(jnp.bfloat16)
    tx = case(**{name: jnp.asarray(HYPERPARAMETERS[name][0], jnp.bfloat16) for name in case.numeric})
    state = jax.eval_shape(tx.init, params)
    assert shapes_and_dtypes(jax.eval_shape(tx.update, params, state, params)) == shapes_and_dtypes((params, state))


@pytest.mark.contract
@over(CONSTRUCTORS)
def test_a_schedule_that_returns_no_number_is_refused_by_name_at_the_first_trace(case: Case) -> None:
    params = make_params()
    for name in case.schedulable:
        for schedule in (lambda count: jnp.ones(2), lambda count: "1e-3", lambda count: optax.constant_schedule(0.1)):
            tx = case(**{name: schedule})
            with refuses(TypeError, "the schedule", "must be a real number"):
                jax.eval_shape(tx.update, params, tx.init(params), params)


@over(CONSTRUCTORS)
def test_the_ends_of_the_ranges_are_admitted(case: Case) -> None:
    for name in set(case.parameters) & set(REFUSED) - case.positive:
        case(**{name: 0})  # also where it has no effect


@over(CONSTRUCTORS)
def test_a_state_dtype_that_is_not_real_floating_point_is_refused(case: Case) -> None:
    for name in (name for name in case.parameters if name.endswith("_dtype")):
        for dtype in (jnp.int8, jnp.complex64):
            with refuses(ValueError, name, jnp.dtype(dtype).name):
                case(**{name: dtype})


@over(ALL, having="batch_size", wiring=True)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_missing_batch_size_is_refused_with_both_remedies(case: Case, jitted: bool) -> None:
    params = make_params()
    tx = case(batch_size=None)
    update = jax.jit(tx.update) if jitted else tx.update
    with refuses(ValueError, "batch_size", "construct", "update(grads, state, params, batch_size="):
        update(params, tx.init(params), params)


@over(ALL, having="batch_size", wiring=True)
def test_the_batch_size_given_to_update_wins(case: Case) -> None:
    params = make_params()
    gradients = make_gradients(params, 2)
    expected = run(case(batch_size=32), params, gradients)
    for at_construction in (None, 2):
        actual = run(case(batch_size=at_construction), params, gradients, batch_size=32)
        assert_close(actual, expected, tolerance_of(case))


@over(ALL, having="batch_size", wiring=True)
def test_a_batch_size_given_to_update_that_is_not_positive_is_refused(case: Case) -> None:
    params = make_params()
    tx = case()
    with refuses(ValueError, "batch_size", "-3"):
        tx.update(params, tx.init(params), params, batch_size=-3)

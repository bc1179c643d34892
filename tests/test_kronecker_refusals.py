"""What the two Kronecker transformations refuse, and what they say then."""

import jax
import jax.numpy as jnp
import optax
import pytest
from kronecker_runs import SETTING, both_forms, scale_by_published

import rootfree_optax as rf


@both_forms
def test_a_state_of_other_parameters_or_another_layout_is_refused(make):
    params = {"w": jnp.zeros((4, 6))}
    tx = make(**SETTING)
    message = r"the state must come from init .* have the shapes \[\(1, 4, 4\).* the layout asks for \[\(\d, "
    for other, layout in (
        ({"w": jnp.zeros((6, 6))}, {}),
        (params, {"block_size": 3}),
        (params, {"structure": "diagonal"}),
    ):
        with pytest.raises(ValueError, match=message):
            make(layout=rf.Layout(**layout), **SETTING).update(other, tx.init(params))
    with pytest.raises(ValueError, match="the state must hold factors that were made with this layout"):
        rf.Layout(block_size=3).plan(params).factors(tx.init(params))
    with pytest.raises(ValueError, match="got none"):
        rf.Layout().plan(params).factors(optax.adam(0.1).init(params))


@both_forms
def test_other_parameters_do_not_get_those_factors_that_are_left_over(make):
    params = {name: jnp.zeros((4, 4)) for name in "abc"}
    state = make(**SETTING).init(params)
    with pytest.raises(ValueError, match="the state must come from init"):
        make(**SETTING).update({"b": params["b"]}, state)
    without_gradient = params | {"a": None}
    make(**SETTING).update(without_gradient, state, params)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    for tx in (make(**SETTING), make(block_axes="data", **SETTING)):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match="params must be given where a gradient is None"):
            tx.update(without_gradient, tx.init(params))


@pytest.mark.parametrize("structure", ["triltoeplitz", "block2diagonal", "hierarchical2_1"])
def test_a_structure_that_the_form_with_inverses_has_not_is_refused_by_path(structure):
    layout = rf.Layout(structure={1: "diagonal", 2: ("dense", structure)})
    with pytest.raises(ValueError, match=rf"'layer/kernel'.*{structure}|{structure}.*'layer/kernel'"):
        rf.scale_by_rf_shampoo(layout=layout).init({"bias": jnp.zeros(5), "layer": {"kernel": jnp.zeros((4, 5))}})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (jnp.int32, "preconditioner_dtype must be None or a real floating-point dtype of 16 bits at least, got int32"),
        (jnp.float8_e4m3fn, "preconditioner_dtype must be .* of 16 bits at least, got float8_e4m3fn"),
        ((jnp.float32, jnp.complex64), "preconditioner_dtype must be .* got complex64"),
        ((jnp.float32,) * 3, "preconditioner_dtype must have one dtype per axis"),
        ({2: (jnp.float32,)}, "preconditioner_dtype must have one dtype per axis"),
    ],
    ids=str,
)
def test_a_dtype_that_does_not_fit_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        scale_by_published(preconditioner_dtype=rule).init({"w": jnp.zeros((2, 3))})


@both_forms
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"update_every": 0}, "update_every must be a whole number of at least 1, got 0"),
        ({"update_every": 2.5}, r"update_every must be a whole number of at least 1, got 2\.5"),
        ({"update_every": float("inf")}, "update_every must be a whole number of at least 1, got inf"),
        ({"preconditioner_lr": -0.1}, r"preconditioner_lr must be at least 0, got -0\.1"),
        ({"damping": float("nan")}, "damping must be at least 0, got nan"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_at_construction(make, setting, message):
    with pytest.raises(ValueError, match=message):
        make(**setting)


def test_more_than_the_newest_curvature_is_refused_with_inverses():
    with pytest.raises(ValueError, match=r"preconditioner_lr must be at most 1, got 1\.5"):
        rf.scale_by_rf_shampoo(1.5)

"""What the two Kronecker transformations refuse, and what they say then."""

import jax
import jax.numpy as jnp
import pytest
from checks import refuses
from kronecker_runs import SETTING, both_forms, scale_by_published
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.blocks.sirf import PublishedRefresh


@both_forms
def test_a_state_of_other_parameters_or_another_layout_is_refused(make):
    params = {"w": jnp.zeros((4, 6))}
    state = make(**SETTING).init(params)
    for other, layout, message in (
        ({"w": jnp.zeros((6, 6))}, {}, "shape of 'w' was [[4, 6]] and is [[6, 6]]"),
        (params, {"block_size": 3}, "block_size of 'w' was [[1, [4, 6]]] and is [[4, [2, 3]]]"),
        (params, {"structure": "diagonal"}, "structure (or max_dense_dim) of 'w' was [['dense', 'dense']]"),
    ):
        with refuses(ValueError, "the state must come from init", message):
            make(layout=whole(**layout), **SETTING).update(other, state)


@both_forms
def test_other_parameters_do_not_get_those_factors_that_are_left_over(make):
    params = {name: jnp.zeros((4, 4)) for name in "abc"}
    state = make(**SETTING).init(params)
    with pytest.raises(ValueError, match="the state must come from init"):
        make(**SETTING).update({"b": params["b"]}, state)
    without_gradient = params | {"a": None}
    make(**SETTING).update(without_gradient, state, params)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    for tx in (make(**SETTING), make(mesh_axes="data", **SETTING)):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match="params must be given where a gradient is None"):
            tx.update(without_gradient, tx.init(params))


@pytest.mark.parametrize("structure", ["triltoeplitz", "block2diagonal", "hierarchical2_1"])
def test_a_structure_that_the_form_with_inverses_has_not_is_refused_by_path(structure):
    layout = whole(structure={1: "diagonal", 2: ("dense", structure)})
    with pytest.raises(ValueError, match=rf"'layer/kernel'.*{structure}|{structure}.*'layer/kernel'"):
        rf.published.scale_by_rf_shampoo(layout=layout).init(
            {"bias": jnp.zeros(5), "layer": {"kernel": jnp.zeros((4, 5))}}
        )


@pytest.mark.parametrize("structure", ["triltoeplitz", "hierarchical1_1"])
def test_a_structure_without_statistics_of_its_own_is_refused_by_path(structure):
    tx = rf.scale_by_sirf_shampoo(layout=whole(structure=structure))
    with refuses(ValueError, "closed under transposition", f"'{structure}'", "'layer/w'", "rf.published.sirf_shampoo"):
        tx.init({"layer": {"w": jnp.zeros((3, 4))}})


@pytest.mark.parametrize("structure", ["triltoeplitz", "hierarchical1_1"])
def test_preconditioners_are_kept_for_symmetric_structures_only(structure):
    tx = scale_by_published(cache_preconditioner=True, batch_size=1, layout=whole(structure=structure))
    with refuses(ValueError, "cache_preconditioner=True", "closed under transposition", f"'{structure}'", "'layer/w'"):
        tx.init({"layer": {"w": jnp.zeros((3, 4))}})


def test_what_is_no_rule_is_refused():
    with refuses(TypeError, "rule must be a BlockRule", "PublishedRefresh"):
        rf.scale_by_kronecker(PublishedRefresh)


@both_forms
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"refresh_every": 0}, "refresh_every must be a whole number of at least 1 and below 2³¹, got 0"),
        ({"preconditioner_lr": -0.1}, r"preconditioner_lr must be .*, got -0\.1"),
        ({"damping": float("nan")}, "damping must be a finite number of at least 0, got nan"),
        ({"batch_size": 0}, "batch_size must be a finite positive number, got 0"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_at_construction(make, setting, message):
    with pytest.raises(ValueError, match=message):
        make(**setting)


def test_more_than_the_newest_curvature_is_refused_with_inverses():
    with pytest.raises(ValueError, match=r"preconditioner_lr must be in \[0, 1\], got 1\.5"):
        rf.published.scale_by_rf_shampoo(1.5)

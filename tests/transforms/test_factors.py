"""Factors read out of states."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import in_contract
from jax.sharding import AxisType
from meshes import FSDP, draw, mesh_of, shardings_on

import rootfree_optax as rf
from rootfree_optax._src.blocks.rf import CholeskyInverse

ALL = rf.Layout(diagonal=None)
BLOCKS = rf.Layout(block_size=4, merge_dims=None, diagonal=None)
PARAMS = {"a": jnp.zeros((6, 4)), "b": jnp.zeros(3)}
GRADIENTS = jax.tree.map(lambda p: jnp.arange(1.0, p.size + 1).reshape(p.shape), PARAMS)


def step(tx: optax.GradientTransformation, params: Any = PARAMS, gradients: Any = GRADIENTS) -> Any:
    """Returns the state after one update."""
    return jax.jit(lambda gradients, params: tx.update(gradients, tx.init(params), params)[1])(gradients, params)


def published(**others: Any) -> optax.GradientTransformationExtraArgs:
    return rf.published.scale_by_sirf_shampoo(**{"damping": 0.1, "batch_size": 1, "layout": ALL, **others})


def test_every_block_has_its_own_matrices_by_name() -> None:
    layout = rf.Layout(("diagonal", "triltoeplitz"), block_size=3, merge_dims=None)
    rule = rf.published.scale_by_sirf_shampoo(batch_size=1, layout=layout)
    params = {"w": jnp.zeros((4, 5))}
    state = step(rule, params, {"w": jnp.arange(1.0, 21).reshape(4, 5)})
    found = rf.factors(state, params, layout)
    assert list(found) == ["w[0, 0]", "w[0, 1]"]
    for name, rows in (("w[0, 0]", 3), ("w[0, 1]", 2)):
        diagonal, toeplitz = map(np.asarray, found[name])
        [of_stack] = [s.block.factors for s in state.stacks if s.block.factors[1][0].shape == (1, rows)]
        np.testing.assert_array_equal(diagonal, np.diag(of_stack[0][0][0]))
        column = np.asarray(of_stack[1][0][0])
        index = np.subtract.outer(np.arange(rows), np.arange(rows))
        np.testing.assert_array_equal(toeplitz, np.where(index < 0, 0, column[index]))


def test_the_factors_of_rf_shampoo_are_the_curvature() -> None:
    found = rf.factors(step(rf.scale_by_kronecker(CholeskyInverse(), weight=1.0, layout=ALL)), PARAMS, ALL)
    np.testing.assert_allclose(found["b"][0], np.diag([1.0, 4.0, 9.0]), rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1e9), optax.chain(tx, optax.scale(-1.0))),
        in_contract(lambda tx: optax.masked(tx, {"a": True, "b": True})),
        lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"a": "x", "b": "x"}),
        in_contract(lambda tx: optax.apply_if_finite(tx, 3)),
    ],
    ids=["chains", "masked", "partition", "apply_if_finite"],
)
def test_they_are_found_within_any_state(wrap: Any) -> None:
    expected = rf.factors(step(published()), PARAMS, ALL)
    found = rf.factors(step(wrap(published())), PARAMS, ALL)
    assert found.keys() == expected.keys() == {"a", "b"}
    jax.tree.map(lambda k, e: np.testing.assert_allclose(k, e, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.contract
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_they_are_found_in_stacks_that_are_padded_to_a_mesh(kind: AxisType) -> None:
    plain, gradients = draw(0), draw(1)
    expected = rf.factors(step(published(layout=BLOCKS), plain, gradients), plain, BLOCKS)
    mesh = mesh_of(kind, 8)
    params, gradients = jax.device_put((plain, gradients), (shardings_on(mesh, FSDP),) * 2)
    with jax.set_mesh(mesh):
        state = step(published(layout=BLOCKS, mesh_axes="data"), params, gradients)
        found = rf.factors(state, params, BLOCKS)
    assert found.keys() == expected.keys()
    assert {len(of_stack.size) % 8 for of_stack in state.stacks} == {0}
    jax.tree.map(lambda k, e: np.testing.assert_allclose(k, e, rtol=1e-5, atol=1e-6), found, expected)


def test_states_that_do_not_fit_are_refused() -> None:
    state = step(published())
    with pytest.raises(ValueError, match=r"of one transformation .* got 0 such .* Pass the layout that it has"):
        rf.factors(state, PARAMS, rf.Layout(block_size=2, diagonal=None))
    with pytest.raises(ValueError, match="got 0 such"):
        rf.factors(optax.adam(0.1).init(PARAMS), PARAMS, ALL)
    with pytest.raises(ValueError, match="the state must hold the factors of one"):
        rf.factors(rf.scale_by_kronecker(WithoutFactors(), layout=ALL).init(PARAMS), PARAMS, ALL)


@dataclasses.dataclass(frozen=True)
class WithoutFactors(rf.BlockRule):
    def init(self, structures: Any, dtypes: Any) -> None:
        return None

    def precondition(self, state: Any, momentum: Any, **others: Any) -> Any:
        return momentum, state


def test_factors_are_of_the_transformation_that_these_parameters_were_given_to() -> None:
    params = {name: jnp.ones((3, 3)) for name in "abc"}  # two blocks of "two" could be one of "one", and padding
    parts = {"one": published(), "two": published(damping=4.0)}
    state = step(optax.partition(parts, {"a": "two", "b": "one", "c": "two"}), params, params)
    for of_one in ({"b": params["b"]}, {"a": None, "b": params["b"], "c": None}):
        expected = rf.factors(state.inner_states["one"], of_one, ALL)
        jax.tree.map(np.testing.assert_array_equal, rf.factors(state, of_one, ALL), expected)


def test_factors_of_several_transformations_are_not_guessed_at() -> None:
    chain = optax.chain(published(), published(damping=4.0))
    with pytest.raises(ValueError, match=r"got 2 such transformations\. .* its own state"):
        rf.factors(step(chain), PARAMS, ALL)


def test_of_no_parameters_there_are_no_factors() -> None:
    assert rf.factors(published().init({}), {}) == {}

"""A state goes on under other names and options."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, in_contract, refuses

import rootfree_optax as rf

SHAPES = {"embedding": (6, 4), "layer_0/w": (4, 4), "layer_1/w": (4, 4), "layer_1/b": (4,), "out": (8, 6)}
RENAMED = {"layer_0": "z_block", "out": "a_out"}


def tree(seed: int, names: Any = SHAPES) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=names[name]), jnp.float32) for name in SHAPES if name in names}


def rename(leaves: dict[str, Any]) -> dict[str, Any]:
    """Other names, and so another order of stacks and of blocks."""
    return {name.replace("layer_0", "z_block").replace("out", "a_out"): leaf for name, leaf in leaves.items()}


@pytest.mark.parametrize("make", [in_contract(rf.sirf_muon), rf.rf_rmsprop], ids=["sirf_muon", "rf_rmsprop"])
def test_training_goes_on_under_other_names(make: Any) -> None:
    tx = optax.apply_if_finite(make(0.1), 5)
    update = jax.jit(tx.update)
    params, state = tree(0), None
    state = tx.init(params)
    for step in range(3):
        _, state = update(tree(step), state, params)
    expected, expected_state = update(tree(9), state, params)
    migrated = rf.migrate(state, tx, rename(params), RENAMED)
    rf.check(migrated, tx, rename(params))
    actual, after = update(rename(tree(9)), migrated, rename(params))
    assert_close(actual, rename(expected))
    back = rf.migrate(after, tx, params, {new: old for old, new in RENAMED.items()})
    assert_close(back, expected_state)


@pytest.mark.contract
def test_what_is_new_starts_and_what_is_gone_is_dropped() -> None:
    tx = rf.scale_by_sirf_shampoo()
    params = tree(0)
    _, state = tx.update(tree(1), tx.init(params), params)
    other = {"layer_1/w": params["layer_1/w"], "new": params["layer_0/w"], "out": params["out"][:, :5]}
    migrated = rf.migrate(state, tx, other)
    rf.check(migrated, tx, other)
    states = ((state, params), (migrated, other), (tx.init(other), other))
    old, new, fresh = (rf.factors(*each, rf.Layout(diagonal=None)) for each in states)
    assert_close(new["layer_1/w"], old["layer_1/w"], tolerance=0)
    assert_close((new["new"], new["out"]), (fresh["new"], fresh["out"]), tolerance=0)
    assert int(migrated.count) == 1


@pytest.mark.contract
def test_another_option_keeps_what_both_have() -> None:
    params = tree(0)
    old, new = rf.sirf_muon(0.1, momentum=None), rf.sirf_muon(0.1, mu_dtype=jnp.bfloat16)
    _, state = old.update(tree(1), old.init(params), params)
    migrated = rf.migrate(state, new, params)
    rf.check(migrated, new, params)
    assert_close(migrated[0].stacks[0].block, state[0].stacks[0].block, tolerance=0)
    assert migrated[0].stacks[0].momentum.dtype == migrated[0].rest.mu["embedding"].dtype == jnp.bfloat16
    assert float(jnp.abs(migrated[0].rest.mu["embedding"]).max()) > 0


@pytest.mark.parametrize("make", [in_contract(rf.sirf_muon), rf.rf_adamw], ids=["sirf_muon", "rf_adamw"])
def test_a_new_parameter_with_the_old_name_of_another_starts_anew(make: Any) -> None:
    """A layer in front of all: it got the state of the layer that had its name."""
    tx = make(0.1)
    old = {f"layer_{i}": tree(i)["layer_0/w"] for i in range(2)}
    _, state = tx.update(old, tx.init(old), old)
    new = {"layer_0": tree(2)["layer_0/w"], "layer_1": old["layer_0"], "layer_2": old["layer_1"]}
    migrated = rf.migrate(state, tx, new, {"layer_0": "layer_1", "layer_1": "layer_2"})
    found, before, fresh = (moments(s) for s in (migrated, state, tx.init(new)))
    expected = {"layer_0": fresh["layer_0"], "layer_1": before["layer_0"], "layer_2": before["layer_1"]}
    assert_close(found, expected, tolerance=0)


def moments(state: Any) -> dict[str, Any]:
    """Returns the momentum of each parameter: all are matrices of one shape."""
    if hasattr(state[0], "mu"):
        return dict(state[0].mu)
    [stack] = state[0].stacks
    return {f"layer_{i}": momentum for i, momentum in enumerate(stack.momentum)}


def test_a_name_is_one_from_the_start() -> None:
    """'a' is no part of 'inner/a'."""
    tx = rf.rf_adamw(0.1)
    old = {"a": {"x": jnp.ones(2)}, "inner": {"a": {"x": 3 * jnp.ones(2)}, "b": {"x": 5 * jnp.ones(2)}}}
    _, state = tx.update(old, tx.init(old), old)
    migrated = rf.migrate(state, tx, {"b": old["a"], "inner": old["inner"]}, {"a": "b"})
    assert_close(migrated[0].nu, {"b": {"x": jnp.ones(2)}, "inner": state[0].nu["inner"]}, tolerance=0)


def test_names_that_are_not_there_are_refused() -> None:
    tx = rf.sirf_muon(0.1)
    state = tx.init(tree(0))
    for renamed, name in (({"layer_7": "z_block"}, "layer_7"), ({"layer_0": "layer_8"}, "layer_8")):
        with refuses(ValueError, "renamed must map", f"'{name}'"):
            rf.migrate(state, tx, tree(0), renamed)
    with refuses(ValueError, "Give both the same wrappers"):
        rf.migrate((state,), tx, tree(0))

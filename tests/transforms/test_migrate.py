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


def test_names_that_are_not_there_are_refused() -> None:
    tx = rf.sirf_muon(0.1)
    state = tx.init(tree(0))
    for renamed, name in (({"layer_7": "z_block"}, "layer_7"), ({"layer_0": "layer_8"}, "layer_8")):
        with refuses(ValueError, "renamed must map", f"'{name}'"):
            rf.migrate(state, tx, tree(0), renamed)
    with refuses(ValueError, "Give both the same wrappers"):
        rf.migrate((state,), tx, tree(0))

"""Every optimizer's state knows what it belongs to: under Optax's wrappers, and after checkpoints of any kind."""

import pathlib
import pickle
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from checks import assert_close, make_params, refuses
from contract import ALL, Case, over

import rootfree_optax as rf

WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), optax.named_chain(("inner", tx))),
    "masked": lambda tx: optax.masked(tx, {"layer": True, "scale": False}),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, {"layer": "a", "scale": "b"}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "inject": lambda tx: optax.inject_hyperparams(lambda factor: optax.chain(tx, optax.scale(factor)))(factor=0.5),
}


def through_flax(state: Any, template: Any, folder: pathlib.Path) -> Any:
    return flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))


def through_pickle(state: Any, template: Any, folder: pathlib.Path) -> Any:
    return pickle.loads(pickle.dumps(state))


def through_orbax(state: Any, template: Any, folder: pathlib.Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", template)


@over(ALL, wiring=True)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_check_finds_a_renamed_parameter_under_every_wrapper(case: Case, wrap: Any) -> None:
    tx, params = wrap(case()), make_params()
    state = tx.init(params)
    assert rf.check(state, tx, params) is None
    assert rf.check(state, tx, jax.eval_shape(lambda: params)) is None
    layer = params["layer"]
    renamed = {**params, "layer": {"z": layer["kernel"], "bias": layer["bias"]}}
    with refuses(ValueError, "kernel' is no longer a parameter", "z' is new"):
        rf.check(state, tx, renamed)


@over(ALL, wiring=True)
@pytest.mark.parametrize("through", [through_orbax, through_flax, through_pickle])
def test_it_goes_with_every_kind_of_checkpoint(case: Case, through: Any, tmp_path: pathlib.Path) -> None:
    tx, params = case(), make_params()
    state, renamed = tx.init(params), {"layer": params["layer"], "zoom": params["scale"]}
    same = through(state, tx.init(params), tmp_path)
    rf.check(same, tx, params)
    assert_close(jax.tree.map(jnp.asarray, same), state, tolerance=0)
    # What a template of other names makes of the same arrays: static data are the template's.
    other = jax.tree.unflatten(jax.tree.structure(tx.init(renamed)), jax.tree.leaves(same))
    with refuses(ValueError, "'scale' is no longer a parameter", "'zoom' is new"):
        rf.check(other, tx, renamed)

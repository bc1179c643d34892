"""The official PyTorch code's trajectories, recorded in tests/golden, are reproduced to 1e-5 of their largest entry."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rootfree_optax as rf

GOLDEN = pathlib.Path(__file__).parent / "golden"


def rmsprop_from(h: dict) -> optax.GradientTransformationExtraArgs:
    return rf.rf_rmsprop(
        h["lr"],
        decay=h["alpha"],
        damping=h["eps"],
        momentum=h.get("momentum"),
        weight_decay=h.get("weight_decay"),
        batch_size=h["batch_size"],
    )


def adamw_from(h: dict) -> optax.GradientTransformationExtraArgs:
    b1, b2 = h["betas"]
    return rf.rf_adamw(
        h["lr"],
        b1=b1,
        b2=b2,
        damping=h["eps"],
        weight_decay=h["weight_decay"],
        batch_size=h["batch_size"],
        bias_correction=h.get("bias_correction", False),
    )


OPTIMIZER_FROM = {"MyRmsProp": rmsprop_from, "MyAdamW": adamw_from}


@pytest.mark.parametrize("name", ["rf_rmsprop", "rf_rmsprop_plain", "rf_adamw", "rf_adamw_bias_correction"])
def test_follows_the_official_trajectory(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as data:
        record = dict(data)
    meta = json.loads(str(record["meta"]))
    tx = OPTIMIZER_FROM[meta["source"].split()[-1]](meta["hyperparameters"])
    indices = range(len(meta["shapes"]))
    params = [jnp.asarray(record[f"p0_{i}"]) for i in indices]
    state = tx.init(params)
    for step in range(meta["steps"]):
        gradients = [jnp.asarray(record[f"grads_{i}"][step]) for i in indices]
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for i in indices:
            expected = record[f"params_{i}"][step]
            np.testing.assert_allclose(params[i], expected, rtol=0, atol=1e-5 * np.abs(expected).max())

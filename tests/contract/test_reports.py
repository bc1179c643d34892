"""What public reports of other optimizers describe, tried on ours: docs/reports.md lists them, each with its test."""

import functools
import pathlib
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import make_gradients, make_params, shapes_and_dtypes
from flax import nnx
from flax.core import freeze

import rootfree_optax as rf

ROOT = pathlib.Path(__file__).parent.parent.parent
ROWS = [line for line in (ROOT / "docs/reports.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


def test_every_report_names_its_source_and_a_test_that_exists() -> None:
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in ROWS if not row.startswith("| report")]
    assert len(rows) >= 60
    assert len({tuple(row[:2]) for row in rows}) == len(rows)
    for source, _, _, test in rows:
        assert source
        [(path, name)] = re.findall(r"`(\S+)::(\w+)`", test)
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / path).read_text(encoding="utf-8"), re.MULTILINE), test


@functools.cache
def shampoo() -> optax.GradientTransformationExtraArgs:
    return rf.sirf_shampoo(1e-2, weight_decay=0.0, layout=rf.Layout(diagonal=None))


@functools.cache
def compiled() -> Any:
    return jax.jit(shampoo().update)


@pytest.mark.contract
def test_fifty_steps_of_nan_leave_an_optimizer_that_goes_on() -> None:
    params = make_params()
    first, last = make_gradients(params, 2)
    _, state = compiled()(first, shampoo().init(params), params)
    for _ in range(50):
        _, state = compiled()(jax.tree.map(lambda leaf: leaf * jnp.nan, first), state, params)
    updates, _ = compiled()(last, state, params)
    assert all(np.all(np.isfinite(leaf)) and np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(updates))


@pytest.mark.contract
def test_a_count_at_its_end_stays_there() -> None:
    params = make_params()
    state = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, 2**31 - 1) if leaf.dtype == jnp.int32 and not leaf.ndim else leaf,
        shampoo().init(params),
    )
    updates, state = compiled()(params, state, params)
    assert optax.tree.get(state, "count") == 2**31 - 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


def types_of_a_step(tx: optax.GradientTransformation, params: Any) -> Any:
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert shapes_and_dtypes(after) == shapes_and_dtypes(state)
    return updates


def frozen_dict() -> Any:
    return freeze({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "bias": jnp.ones(2)})


def with_dropout() -> Any:
    """The rate of a Dropout is None among the parameters."""
    layers = [eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5)]
    return eqx.filter(eqx.nn.Sequential(layers), eqx.is_inexact_array)


PARAMS = {
    "bfloat16": lambda: make_params(jnp.bfloat16),
    "FrozenDict": frozen_dict,
    "nnx": lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "equinox": with_dropout,
}


@pytest.mark.contract
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kind", PARAMS)
def test_wrappers_keep_the_types_of_every_frameworks_parameters(kind: str) -> None:
    params, tx = PARAMS[kind](), rf.sirf_muon(1e-3)
    labels = lambda tree: jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "frozen", tree)
    masks = [lambda tree, rank=rank: jax.tree.map(lambda leaf: leaf.ndim == rank, tree) for rank in (1, 2)]
    for wrapped in (
        optax.MultiSteps(tx, 2).gradient_transformation(),
        optax.partition({"matrix": tx, "frozen": optax.set_to_zero()}, labels),
        optax.chain(*(optax.masked(tx, mask) for mask in masks)),
    ):
        updates = types_of_a_step(wrapped, params)
        assert shapes_and_dtypes(updates) == shapes_and_dtypes(params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)

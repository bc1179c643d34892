"""The search behind train_digits.py's settings, at a size of seconds."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import searching
import tune_digits
from methods import METHODS

pytestmark = [pytest.mark.research, pytest.mark.usefixtures("standard_promotion")]


def test_search_chooses_among_its_finalists(tmp_path: pathlib.Path) -> None:
    budget = ["--trials", "3", "--seeds", "2", "--finalists", "2", "--final-seeds", "1", "--epochs", "2"]
    tune_digits.main(["--methods", "rf_rmsprop", *budget, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "rf_rmsprop.json").read_text())
    assert (len(record["trials"]), len(record["finalists"])) == (3, 2)
    best = min(record["finalists"], key=lambda row: (row["validation_error"], row["validation_loss"]))
    assert record["chosen"] == {name: best[name] for name in METHODS["rf_rmsprop"].ranges}
    assert max(row["validation_error"] for row in record["finalists"]) <= 1


def test_ranking_puts_diverged_trials_last_and_breaks_ties_by_loss() -> None:
    outcomes = {
        "validation_error": np.array([[0.1, 1.0], [0.2, 0.2], [0.1, 0.3], [0.3, 0.3]]),
        "validation_loss": np.array([[0.5, np.nan], [0.9, 0.7], [0.7, 0.8], [0.1, 0.1]]),
    }
    assert tune_digits.ranking(outcomes).tolist() == [2, 1, 3, 0]
    rows = searching.rows({"momentum": np.arange(4.0)}, outcomes)
    assert rows[0] == {"momentum": 0.0, "validation_error": 0.55, "validation_loss": None}


@pytest.mark.parametrize("name", METHODS)
def test_draws_fill_their_range(name: str) -> None:
    for limits in METHODS[name].ranges.values():
        draws = limits.draw(np.random.default_rng(0), 400)
        logarithms = np.log(1 - draws if limits.of_one_minus else draws)
        low, high = np.log(limits.low), np.log(limits.high)
        assert low <= logarithms.min() < logarithms.max() <= high + 1e-12
        np.testing.assert_allclose(logarithms.mean(), (low + high) / 2, atol=0.05 * (high - low))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_traced_hyperparameters(name: str) -> None:
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}

    def first_update(settings: dict[str, jax.Array]) -> dict[str, jax.Array]:
        optimizer = METHODS[name].optimizer(settings, 10, 4)
        return optimizer.update(params, optimizer.init(params), params)[0]

    updates = jax.eval_shape(first_update, {key: values[0] for key, values in METHODS[name].draw(1).items()})
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)

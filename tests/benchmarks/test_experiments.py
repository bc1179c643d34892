"""The experiments' networks, tasks, protocol and report, at a size of seconds."""

import json
import pathlib

import choose_defaults
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import report_experiments
import run_experiments
from experiments import figures, summary, tables
from experiments.methods import ABSENT, METHODS, Candidate
from experiments.models import LSTM, VisionTransformer
from experiments.tasks import TASKS, characters, graphs
from experiments.training import Outcome
from experiments.trials import Runner, ranking
from flax import nnx
from searching import Range, to_json

pytestmark = [pytest.mark.research, pytest.mark.usefixtures("standard_promotion")]


def test_lstm_sees_the_past_alone_and_the_vision_transformer_all_patches() -> None:
    lstm = LSTM(5, 4, 8, rngs=nnx.Rngs(0))
    text = jnp.array([[0, 1, 2, 3, 4, 0]])
    logits, changed = nnx.jit(lambda lstm, text: lstm(text))(lstm, jnp.concatenate([text, text.at[0, 3].set(0)]))
    np.testing.assert_allclose(logits[:3], changed[:3], atol=1e-6)
    assert jnp.abs(logits[3:] - changed[3:]).max(axis=-1).min() > 1e-5
    vit = VisionTransformer(4, 1, 3, patch=2, width=8, layers=1, heads=2, rngs=nnx.Rngs(0))
    picture = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
    gradient = nnx.jit(nnx.grad(lambda picture, vit: vit(picture)[0, 0]))(picture, vit)
    assert jnp.abs(gradient).min() > 0


def test_graphs_are_disjoint_and_normalised_and_the_club_has_two_factions() -> None:
    data, adjacency, classes = graphs()
    nodes, targets = (np.concatenate([getattr(split, key) for split in data]) for key in ("inputs", "targets"))
    assert sorted(nodes) == list(range(34 + 77 + 32))
    club = targets[np.argsort(nodes)][:34]
    assert np.bincount(club).tolist() == [17, 17]
    assert targets.max() + 1 == classes
    np.testing.assert_allclose(np.linalg.eigvalsh(adjacency).max(), 1, atol=1e-5)
    assert not adjacency[:34, 34:].any()


def test_splits_of_the_characters_share_no_sequence() -> None:
    data = characters()
    np.testing.assert_array_equal(data.test.inputs[:, 1:], data.test.targets[:, :-1])
    train = {bytes(row) for row in np.asarray(data.train.inputs)}
    assert sum(bytes(row) in train for row in np.asarray(data.test.inputs)) <= 5


def sgd(learning_rate: optax.Schedule, batch_size: int, **others: jax.Array) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, **others)


def test_runs_side_by_side_are_the_runs_one_by_one_and_one_that_diverges_harms_no_other() -> None:
    method = Candidate("SGD", sgd, {"learning_rate": Range(0.1, 1.0)})
    settings, seeds = {"learning_rate": np.array([0.5, 1e30, 0.5])}, np.array([0, 1, 2])
    together = Runner(TASKS["graphs"], method, at_once=2)(settings, seeds)
    alone = Runner(TASKS["graphs"], method, at_once=2)({"learning_rate": np.array([0.5, 0.5])}, seeds[[2, 0]])
    np.testing.assert_allclose(together.train_loss[[2, 0]], alone.train_loss, rtol=1e-4)
    assert alone.train_loss[:, -1].max() < alone.train_loss[:, 0].min()
    assert together.test_error[1] == 1
    assert not np.isfinite(together.validation_loss[1, -1])


def outcome(error: list[float], loss: list[float]) -> Outcome:
    errors, losses = (np.array(values)[:, np.newaxis, np.newaxis] for values in (error, loss))
    return Outcome(losses, errors, losses, errors[..., 0], losses[..., 0])


def test_ranking_is_by_what_is_reported_and_puts_the_diverged_last() -> None:
    measured = outcome([0.2, 1.0, 0.1, 0.1], [0.1, np.nan, 0.9, 0.8])
    assert ranking(TASKS["digits_vgg"], measured).tolist() == [3, 2, 0, 1]
    assert ranking(TASKS["characters_lstm"], measured).tolist() == [0, 3, 2, 1]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ABSENT and name != "distributed_shampoo"])
def test_untuned_values_cover_what_is_tuned_and_are_accepted(name: str) -> None:
    method = METHODS[name]
    assert set(method.ranges) == {"learning_rate", *method.defaults}
    settings = {key: values[0] for key, values in method.untuned().items()} | dict(method.fixed)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}

    def first_update(settings: dict[str, jax.Array], params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        optimizer = method.optimizer(settings, 10, 4)
        return optimizer.update(params, optimizer.init(params), params)[0]

    updates = jax.eval_shape(first_update, settings, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_suite_skips_what_is_done_and_the_report_shows_what_was_measured(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    names = ["adamw", "rf_rmsprop"]
    budget = ["--trials", "4", "--finalists", "2", "--final-seeds", "1", "--fresh-seeds", "2"]
    records, output = tmp_path / "records", tmp_path / "output"
    arguments = ["--task", "graphs", *budget, "--records", str(records), "--optimizer"]
    run_experiments.main([*arguments, "adamw"])
    before = (records / "graphs" / "adamw.json").read_text()
    run_experiments.main([*arguments, *names])
    assert (records / "graphs" / "adamw.json").read_text() == before
    report_experiments.main(["--records", str(records), "--output", str(output)])
    numbers, printed = json.loads((output / "summary.json").read_text()), capsys.readouterr().out
    for name in names:
        record = json.loads((records / "graphs" / f"{name}.json").read_text())
        assert len(record["trials"]) == 4
        assert record["chosen"]["learning_rate"] in [row["learning_rate"] for row in record["finalists"]]
        test = numbers["tasks"]["graphs"]["methods"][name]["test"]
        np.testing.assert_allclose(test["mean"], np.mean(record["tested"]["test_error"]), rtol=1e-4)
        assert f"{100 * test['mean']:.2f} ± {100 * test['std']:.2f}" in (output / "tables.md").read_text()
        assert f"{100 * test['mean']:.3g}" in printed
    assert numbers["tasks"]["graphs"]["methods"]["adamw"]["steps_to_reference_loss"] <= 100
    assert len(list(output.glob("*.png"))) == 1
    for draw in (figures.draw_curves, figures.draw_regrets):  # of what was written, as the notebook does
        figures.save(draw(numbers), tmp_path / "figure.png")

    choose_defaults.main(
        [
            "--optimizer",
            "rf_rmsprop",
            "--task",
            "graphs",
            "--candidates",
            "1",
            "--seeds",
            "1",
            "--records",
            str(records),
            "--output",
            str(output),
        ]
    )
    rows = json.loads((output / "defaults.json").read_text())["rf_rmsprop"]
    assert sorted(row["is_default"] for row in rows) == [False, True]
    assert rows[0]["mean_log_ratio"] <= rows[1]["mean_log_ratio"]
    assert rows[0]["settings"].keys() == dict(METHODS["rf_rmsprop"].defaults).keys()
    record = json.loads((records / "graphs" / "rf_rmsprop.json").read_text())
    changed = record | {"defaults": record["defaults"][:1]}
    (records / "graphs" / "rf_rmsprop.json").write_text(json.dumps(changed))
    run_experiments.main([*arguments, "rf_rmsprop", "--defaults-alone"])
    assert json.loads((records / "graphs" / "rf_rmsprop.json").read_text()) == record


def test_candidates_are_rounded_to_one_digit_of_the_value_or_of_what_it_lacks_to_one() -> None:
    assert choose_defaults.to_one_digit(0.0123, of_one_minus=False) == 0.01
    assert choose_defaults.to_one_digit(0.9877, of_one_minus=True) == 0.99


def test_steps_are_to_the_seeds_mean_and_a_lost_seed_reaches_nothing() -> None:
    record = {"reported": "error", "steps": 20, "tested": {"train_loss": [[3.0, 1.0], [5.0, 1.0]]}}
    assert summary.steps_to(record, 4.0) == 10
    assert summary.steps_to(record, 0.5) is None
    record["tested"] = {"train_loss": [[3.0, 1.0], [5.0, None]]}
    assert summary.steps_to(record, 2.0) is None
    lost = summary.statistics([1.0, None, 3.0])
    assert (lost["mean"], lost["diverged"]) == (2.0, 1)


def test_cells_of_the_report_say_what_the_summary_holds() -> None:
    row = lambda mean, diverged, steps: {
        "label": "M",
        "is_ablation": False,
        "test": {"mean": mean, "std": 0.01, "diverged": diverged},
        "trials": {"best": 0.05, "quartile": 0.1, "median": np.inf, "non_finite": 3},
        "steps_to_reference_loss": steps,
        "seconds_to_reference_loss": 1.5,
    }
    numbers = {
        "tasks": {"t": {"label": "T", "reported": "error", "methods": {"m": row(0.1, 0, 40), "n": row(0.2, 2, None)}}},
        "defaults": {"m": {"tasks": {"t": {"regret": 0.123, "diverged": 0}}}},
        "one_setting": {"m": {"tasks": {"t": -0.04}}, "n": {"tasks": {"t": np.inf}}},
    }
    assert tables.tested(numbers, "t", "m") == "**10.00 ± 1.00**"
    assert tables.tested(numbers, "t", "n") == "20.00 ± 1.00 (2 diverged)"
    assert [tables.speed(numbers, "t", name) for name in "mn"] == ["40, 1.50 s", "–"]
    assert tables.trials(numbers, "t", "m") == "5 / 10 / ∞ (3)"
    assert tables.regret(numbers, "t", "m") == "+12 %"
    assert [tables.one_setting(numbers, "t", name) for name in "mn"] == ["-4 %", "diverged"]


def test_records_have_five_digits_one_line_a_row_and_null_for_what_is_not_finite() -> None:
    record = {"value": 1.23456789, "row": {"a": np.nan, "b": [1, 2.0]}, "rows": [{"c": 3e-9 / 7}, {"c": None}]}
    text = to_json(record)
    assert json.loads(text) == {
        "value": 1.2346,
        "row": {"a": None, "b": [1, 2.0]},
        "rows": [{"c": 4.2857e-10}, {"c": None}],
    }
    assert len(text.splitlines()) == 2 + 2 + 2 + 2

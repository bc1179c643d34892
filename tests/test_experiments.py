"""The experiments' networks, tasks, protocol and report, at a size of seconds."""

import json
import pathlib

import choose_defaults
import image_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import report_experiments
import run_experiments
from experiments import summary, tables
from experiments.methods import ABSENT, METHODS, Candidate
from experiments.models import LSTM, VisionTransformer
from experiments.tasks import TASKS, characters, graphs
from experiments.training import Outcome
from experiments.trials import Runner, ranking
from flax import nnx
from PIL import Image
from searching import Range

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_lstm_sees_the_past_alone_and_the_vision_transformer_all_patches() -> None:
    lstm = LSTM(5, 4, 8, rngs=nnx.Rngs(0))
    text = jnp.array([[0, 1, 2, 3, 4, 0]])
    logits, changed = nnx.jit(lambda lstm, text: lstm(text))(lstm, jnp.concatenate([text, text.at[0, 3].set(0)]))
    np.testing.assert_allclose(logits[:3], changed[:3], atol=1e-6)
    assert jnp.abs(logits[3:] - changed[3:]).max(axis=-1).min() > 1e-5
    vit = VisionTransformer(4, 1, 3, patch=2, width=8, layers=1, heads=2, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
    gradient = nnx.jit(nnx.grad(lambda images, vit: vit(images)[0, 0]))(images, vit)
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
    arguments = ["--task", "graphs", *budget, "--results", str(tmp_path), "--optimizer"]
    run_experiments.main([*arguments, "adamw"])
    before = (tmp_path / "graphs" / "adamw.json").read_text()
    run_experiments.main([*arguments, *names])
    assert (tmp_path / "graphs" / "adamw.json").read_text() == before
    report_experiments.main(["--results", str(tmp_path)])
    numbers, printed = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out
    for name in names:
        record = json.loads((tmp_path / "graphs" / f"{name}.json").read_text())
        assert len(record["trials"]) == 4
        assert record["chosen"]["learning_rate"] in [row["learning_rate"] for row in record["finalists"]]
        test = numbers["tasks"]["graphs"][name]["test"]
        np.testing.assert_allclose(test["mean"], np.mean(record["tested"]["test_error"]))
        assert f"{100 * test['mean']:.2f} ± {100 * test['std']:.2f}" in (tmp_path / "tables.md").read_text()
        assert f"{100 * test['mean']:.3g}" in printed
    assert numbers["tasks"]["graphs"]["adamw"]["steps_to_reference_loss"] <= 100
    assert len(list(tmp_path.glob("*.png"))) == 4

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
            "--results",
            str(tmp_path),
        ]
    )
    rows = json.loads((tmp_path / "defaults.json").read_text())["rf_rmsprop"]
    assert sorted(row["is_default"] for row in rows) == [False, True]
    assert rows[0]["mean_log_ratio"] <= rows[1]["mean_log_ratio"]
    assert rows[0]["settings"].keys() == dict(METHODS["rf_rmsprop"].defaults).keys()
    record = json.loads((tmp_path / "graphs" / "rf_rmsprop.json").read_text())
    changed = record | {"defaults": record["defaults"][:1]}
    (tmp_path / "graphs" / "rf_rmsprop.json").write_text(json.dumps(changed))
    run_experiments.main([*arguments, "rf_rmsprop", "--defaults-alone"])
    assert json.loads((tmp_path / "graphs" / "rf_rmsprop.json").read_text()) == record


def test_candidates_are_rounded_to_one_digit_of_the_value_or_of_what_it_lacks_to_one() -> None:
    assert choose_defaults.rounded(0.0123, of_one_minus=False) == 0.01
    assert choose_defaults.rounded(0.9877, of_one_minus=True) == 0.99


def test_steps_are_to_the_seeds_mean_and_a_lost_seed_reaches_nothing() -> None:
    record = {"reported": "error", "steps": 20, "tested": {"train_loss": [[3.0, 1.0], [5.0, 1.0]]}}
    assert summary.steps_to(record, 4.0) == 10
    assert summary.steps_to(record, 0.5) is None
    record["tested"] = {"train_loss": [[3.0, 1.0], [5.0, None]]}
    assert summary.steps_to(record, 2.0) is None
    lost = summary.statistics([1.0, None, 3.0])
    assert (lost["mean"], lost["diverged"]) == (2.0, 1)


def test_reads_a_folder_of_pictures(tmp_path: pathlib.Path) -> None:
    for part in ("train", "val"):
        for label, color in enumerate([(255, 90, 0), (0, 80, 255)]):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(5):
                Image.new("RGB", (40 + index, 50), color).save(folder / f"{index}.png")
    data = image_data.load(tmp_path)
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [9, 1, 10]
    assert data.test.images.shape == (10, 32, 32, 3)
    red, blue = (data.test.images[data.test.labels == label] for label in range(2))
    assert (red[..., 0] > blue[..., 0]).all()


def test_cells_of_the_report_say_what_the_summary_holds() -> None:
    records = {"t": {"m": {"reported": "error"}, "n": {"reported": "error"}}}
    row = lambda mean, diverged: {
        "test": {"mean": mean, "std": 0.01, "diverged": diverged},
        "trials": {"best": 0.05, "quartile": 0.1, "median": np.inf, "non_finite": 3},
        "steps_to_reference_loss": 40,
        "seconds_to_reference_loss": 1.5,
    }
    tasks = {"t": {"m": row(0.1, 0), "n": row(0.2, 2)}}
    assert tables.tested(records, tasks, "t", "m") == "**10.00 ± 1.00**"
    assert tables.tested(records, tasks, "t", "n") == "20.00 ± 1.00 (2 diverged)"
    assert tables.speed(tasks, "t", "m") == "40, 1.50 s"
    tasks["t"]["n"] |= {"steps_to_reference_loss": None}
    assert tables.speed(tasks, "t", "n") == "–"
    assert tables.trials(records, tasks, "t", "m") == "5 / 10 / ∞ (3)"
    defaults = {"m": {"tasks": {"t": {"regret": 0.123, "diverged": 0}}}}
    assert [tables.regret(defaults, "t", name) for name in "mn"] == ["+12 %", ""]
    settings = {"m": {"tasks": {"t": -0.04}}}
    assert [tables.one_setting(settings, "t", name) for name in "mn"] == ["-4 %", "diverged"]

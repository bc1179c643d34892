"""The character transformer's search and comparison, at a size of seconds."""

import json
import pathlib

import compare_characters
import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import optax
import progress
import pytest
import tune_characters
import widths_characters
from characters import corpus
from characters.methods import METHODS
from characters.training import SEQUENCE, Network, Run
from characters.trials import Budget, choose, train
from flax import nnx
from searching import Method, Range

SMALL = Network(width=32, layers=1)
FLAGS = ["--layers", "1", "--batch-size", "4"]


pytestmark = [pytest.mark.research, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(scope="module")
def data() -> corpus.Corpus:
    return corpus.load(SEQUENCE, validation_sequences=64)


def test_corpus_is_split_by_file(data: corpus.Corpus) -> None:
    assert data.validation.shape == (64, SEQUENCE + 1)
    assert max(data.train.max(), data.validation.max()) < corpus.VOCABULARY
    train_text = bytes(np.asarray(data.train))
    repeated = sum(bytes(np.asarray(sequence)) in train_text for sequence in data.validation[:32])
    assert repeated <= 3
    np.testing.assert_array_equal(corpus.encode("\n a~\tä\0"), [0, 1, 66, 95, 96, 32, 32])


def test_logits_depend_on_the_past_alone() -> None:
    model = SMALL.model(jax.random.key(0))
    text = jax.random.randint(jax.random.key(1), (2, SEQUENCE), 0, corpus.VOCABULARY)
    changed = text.at[:, 40].set((text[:, 40] + 1) % corpus.VOCABULARY)
    logits, others = nnx.jit(lambda model, text: model(text))(model, jnp.stack([text, changed]).reshape(4, -1)).reshape(
        2, 2, SEQUENCE, -1
    )
    np.testing.assert_allclose(logits[:, :40], others[:, :40], atol=1e-5)
    assert jnp.abs(logits[:, 40:] - others[:, 40:]).max(axis=-1).min() > 1e-3


def test_one_program_serves_all_trials_and_one_that_diverges_comes_last(data: corpus.Corpus) -> None:
    traced = []

    def build(learning_rate: optax.Schedule, batch_size: int) -> optax.GradientTransformation:
        traced.append(batch_size)
        return optax.sgd(learning_rate)

    run = Run(Method("SGD", build, {"learning_rate": Range(1e-2, 1e30)}), SMALL, batch_size=4)
    with progress.progress_bar() as bar:
        record = choose(run, data, Budget(steps=40, trials=4, finalists=4, final_seeds=1), bar)
    assert traced == [4, 4]  # to start, and to train
    losses = [row["validation_loss"] for row in record["trials"]]
    assert record["non_finite"] == sum(loss is None for loss in losses) > 0
    best = np.nanargmin(np.array([row["validation_loss"] for row in record["finalists"]], float))
    assert record["chosen"]["learning_rate"] == record["finalists"][best]["learning_rate"]
    curves = train(run, data, 40, {"learning_rate": 1e30}, seed=0, every_segment=True)
    assert (curves.train_loss.shape, curves.validation_loss.shape) == ((4,), (2,))
    assert np.isnan(curves.train_loss[-1])
    assert traced == [4, 4]


def test_tunes_and_compares(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    names, folders = ["adamw", "rf_rmsprop"], ["--records", str(tmp_path), "--output", str(tmp_path)]
    budget = ["--trials", "2", "--finalists", "2", "--final-seeds", "1", "--fresh-seeds", "2", "--steps", "40"]
    tune_characters.main(["--optimizer", *names, *budget, "--width", "32", *FLAGS, "--output", str(tmp_path)])
    capsys.readouterr()
    compare_characters.main(["--optimizer", *names, "--rounds", "1", "--shorter-seeds", "1", *folders])
    capsys.readouterr()
    compare_characters.main(["--optimizer", *names, "--measure", *folders])
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    picture = matplotlib.image.imread(tmp_path / "comparison.png")[..., :3]
    for name in names:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(record["trials"]) == 2
        assert np.array(record["validation_curves"]).shape == (2, 2)
        loss = summary[name]["validation_loss"]
        np.testing.assert_allclose(loss["mean"], np.mean(record["validation_loss"]), rtol=1e-4)
        assert loss["mean"] < np.log(corpus.VOCABULARY)
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {METHODS[name].label}"))
        shown = [float(number) for number in line.split("│")[2].split("±")]
        np.testing.assert_allclose(shown, [loss["mean"], loss["standard_error"]], atol=6e-4)
        color = matplotlib.colors.to_rgb(compare_characters.STYLES[name][0])
        assert (np.abs(picture - color).max(axis=-1) < 0.01).sum() > 100
    assert summary["adamw"]["steps_to_reference_loss"] <= 40

    searched = json.loads((tmp_path / "adamw.json").read_text())
    known = ["--optimizer", "adamw", "--setting-of", "adamw", *budget, "--width", "32", *FLAGS]
    tune_characters.main([*known, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "adamw.json").read_text())
    assert record["setting_of"] == "adamw"
    assert record["trials"] == []
    assert record["chosen"] == searched["chosen"]
    np.testing.assert_allclose(record["validation_loss"], searched["validation_loss"], rtol=1e-3)


def test_a_seed_that_diverges_is_counted_and_reaches_nothing() -> None:
    seeds = [[3.0, 2.0], [4.0, 1.0]]
    record = {"optimizer": "adamw", "chosen": {}, "validation_curves": seeds}
    lost = {"optimizer": "muon", "chosen": {}, "validation_curves": [[3.0, 1.0], [1.0, None]]}
    times = {"adamw": 2.0, "muon": 3.0}
    half = {name: compare_characters.statistics(np.array([1.0, np.nan])) for name in times}
    summary = compare_characters.summarize({"adamw": record, "muon": lost}, times, half)
    assert summary["adamw"]["validation_loss"] == {"mean": 1.5, "standard_error": 0.5, "diverged": 0}
    assert summary["adamw"]["steps_to_reference_loss"] == 40
    np.testing.assert_allclose(summary["adamw"]["seconds_to_reference_loss"], 0.08)
    assert summary["muon"]["validation_loss"] == {"mean": 1.0, "standard_error": 0.0, "diverged": 1}
    assert summary["muon"]["steps_to_reference_loss"] is None
    assert "1 diverged" in compare_characters.text_of(summary["muon"]["validation_loss"])


def test_every_width_is_compared_with_its_own_best(tmp_path: pathlib.Path) -> None:
    budget = ["--trials", "3", "--seeds", "1", "--base-trials", "2", "--base-width", "32", "--steps", "20"]
    arguments = ["--refresh", "published", "--widths", "32", *budget, *FLAGS, "--output", str(tmp_path)]
    widths_characters.main(arguments)
    record = json.loads((tmp_path / "widths_published.json").read_text())
    (row,) = record["widths"]
    assert row["trials"][0]["preconditioner_lr"] == record["chosen"]["preconditioner_lr"]
    np.testing.assert_allclose(row["excess"], row["fixed"] / row["tuned"] - 1, atol=1e-4)
    assert (tmp_path / "widths.png").is_file()

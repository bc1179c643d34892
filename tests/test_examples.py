"""The examples run as their users run them, and read CIFAR files laid out byte by byte as the public archives are."""

import dataclasses
import json
import pathlib
import pickle
import struct
from collections.abc import Callable
from typing import Any

import convnet
import image_data
import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import reporting
import searching
import train_digits
import train_digits_linen
import training
import tune_digits
from methods import METHODS, tuned_settings

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_trains_and_reports(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    names = ["rf_rmsprop", "adamw"]
    train_digits.main(["--optimizer", *names, "--seeds", "2", "--output", str(tmp_path)])
    summary = json.loads((tmp_path / "digits.json").read_text())
    assert list(summary) == names
    printed = capsys.readouterr().out
    picture = matplotlib.image.imread(tmp_path / "digits.png")[..., :3]
    for name, row in summary.items():
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {METHODS[name].label}"))
        assert f"{100 * row['test_error_mean']:.2f} ± {100 * row['test_error_std']:.2f}" in line
        assert row["test_error_mean"] < 0.04
        assert row["train_loss"] < 0.1
        assert row["steps"] == 20 * 6
        color = matplotlib.colors.to_rgb(reporting.COLORS[list(METHODS).index(name)])
        assert (np.abs(picture - color).max(axis=-1) < 0.01).sum() > 100
    assert 102 <= summary["adamw"]["steps_to_reference_loss"] <= 120  # in the last epochs it hardly falls
    assert 60 <= summary["rf_rmsprop"]["steps_to_reference_loss"] <= 96


def test_linen_loop_learns() -> None:
    losses, error = train_digits_linen.main([])
    assert losses.shape == (20 * 6,)
    assert losses[0] > 2
    assert losses[-6:].mean() < 0.1
    assert error < 0.04


@pytest.mark.parametrize("name", METHODS)
def test_tuned_settings_lie_in_their_ranges_and_make_a_descent_step(name: str) -> None:
    settings = tuned_settings(name)
    for key, limits in METHODS[name].ranges.items():
        value = 1 - settings[key] if limits.of_one_minus else settings[key]
        assert limits.low * 0.999 < value < limits.high * 1.001
    run = training.Run(METHODS[name], training.Network(1, 10, (4,)), train_size=100, epochs=1, batch_size=10)
    optimizer = run.optimizer(settings)
    params = {"weight": jnp.zeros(3)}
    state = optimizer.init(params)
    for _ in range(2):  # the warm-up's first step is zero
        updates, state = optimizer.update({"weight": jnp.array([1.0, -2.0, 0.0])}, state, params)
    np.testing.assert_array_equal(np.sign(updates["weight"]), [-1, 1, 0])


def test_search_chooses_among_its_finalists(tmp_path: pathlib.Path) -> None:
    budget = ["--trials", "3", "--seeds", "2", "--finalists", "2", "--final-seeds", "1", "--epochs", "2"]
    budget += ["--train-size", "100", "--widths", "4"]
    tune_digits.main(["--optimizer", "rf_rmsprop", *budget, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "rf_rmsprop.json").read_text())
    assert (len(record["trials"]), len(record["finalists"])) == (3, 2)
    best = min(record["finalists"], key=lambda row: (row["validation_error"], row["validation_loss"]))
    assert tuned_settings("rf_rmsprop", tmp_path) == {name: best[name] for name in METHODS["rf_rmsprop"].ranges}
    assert max(row["validation_error"] for row in record["finalists"]) <= 1
    with pytest.raises(FileNotFoundError, match=r"tune_digits.py --optimizer sgd"):
        tuned_settings("sgd", tmp_path)


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
def test_every_method_has_a_warmup_and_a_cosine_to_zero(name: str) -> None:
    schedules = []
    method = dataclasses.replace(METHODS[name], build=lambda schedule, **_: schedules.append(schedule))
    settings = {key: values[0] for key, values in method.draw(1).items()} | {"learning_rate": 0.5}
    method.optimizer(settings, 100, 32)
    steps = jnp.array([0, 5, 10, 55, 100])
    np.testing.assert_allclose(jax.vmap(schedules[0])(steps), [0, 0.25, 0.5, 0.25, 0], atol=1e-6)


def test_steps_to_a_loss_are_those_of_the_seeds_mean() -> None:
    loss = np.array([[4.0, 2.0], [1.0, 3.0], [0.0, 1.0]])
    history = reporting.History(np.array([6, 12, 18]), loss, np.array([18]), np.array([[0.1, 0.2]]), 0.0)
    assert reporting.steps_to(history, 2.0) == 12
    assert reporting.steps_to(history, 0.4) is None
    summary = reporting.summarize({"sgd": history})["sgd"]
    assert summary["steps_to_reference_loss"] is None
    np.testing.assert_allclose([summary["test_error_mean"], summary["test_error_std"]], [0.15, 0.1 / np.sqrt(2)])


def test_product_of_patches_is_the_convolution() -> None:
    keys = jax.random.split(jax.random.key(0))
    images, kernel = jax.random.normal(keys[0], (2, 5, 4, 3)), jax.random.normal(keys[1], (3, 3, 3, 2))
    settings = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, "precision": None}

    @jax.jit
    def both(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        layout = ("NHWC", "HWIO", "NHWC")
        expected = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return convnet.convolve_patches(images, kernel, (1, 1), "SAME", **settings), expected

    actual, expected = both(images, kernel)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    with pytest.raises(NotImplementedError, match="strides"):
        convnet.convolve_patches(images, kernel, (2, 2), "SAME", **settings)


def python2_string(text: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(text)) + text


def python2_integers(values: list[int]) -> bytes:
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def python2_rows(rows: np.ndarray) -> bytes:
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in rows.shape) + b"t"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python2_string(rows.tobytes()) + b"tb"


def python2_pickle(entries: dict[bytes, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(python2_string(key) + value for key, value in entries.items()) + b"u."


Writer = Callable[[pathlib.Path, np.ndarray, np.ndarray], None]


def write_cifar10_pickle(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    entries = {b"batch_label": python2_string(b"a batch"), b"labels": python2_integers(labels.tolist())}
    path.write_bytes(python2_pickle(entries | {b"data": python2_rows(rows)}))


def write_cifar100_pickle(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    entries = {b"coarse_labels": python2_integers((labels // 5).tolist()), b"data": python2_rows(rows)}
    path.write_bytes(python2_pickle(entries | {b"fine_labels": python2_integers(labels.tolist())}))


def write_cifar10_binary(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    path.with_suffix(".bin").write_bytes(np.column_stack([labels, rows]).tobytes())


def write_cifar100_binary(path: pathlib.Path, rows: np.ndarray, labels: np.ndarray) -> None:
    path.with_suffix(".bin").write_bytes(np.column_stack([labels // 5, labels, rows]).tobytes())


CIFAR10_FILES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
ARCHIVES: dict[str, tuple[Writer, list[str], int]] = {
    "cifar10_pickle": (write_cifar10_pickle, CIFAR10_FILES, 10),
    "cifar10_binary": (write_cifar10_binary, CIFAR10_FILES, 10),
    "cifar100_pickle": (write_cifar100_pickle, ["train", "test"], 100),
    "cifar100_binary": (write_cifar100_binary, ["train", "test"], 100),
}


def write_archive(directory: pathlib.Path, archive: str, images_per_file: int) -> dict[str, tuple[Any, Any]]:
    """Writes random images into all files of an archive; returns the images as [n, channel, row, column] and labels."""
    write, files, classes = ARCHIVES[archive]
    rng = np.random.default_rng(0)
    written = {}
    for file in files:
        rows = rng.integers(0, 256, (images_per_file, 3072), np.uint8)
        labels = rng.integers(0, classes, images_per_file, np.uint8)
        write(directory / file, rows, labels)
        written[file] = rows.reshape(-1, 3, 32, 32), labels
    return written


@pytest.mark.parametrize("archive", ARCHIVES)
def test_reads_cifar(archive: str, tmp_path: pathlib.Path) -> None:
    written = write_archive(tmp_path, archive, images_per_file=10)
    data = image_data.load(tmp_path)
    classes = ARCHIVES[archive][2]
    assert (data.name, data.classes) == (f"cifar{classes}", classes)
    test_images, test_labels = written.popitem()[1]
    np.testing.assert_array_equal(data.test.labels, test_labels)
    train_count = 9 * len(written)
    assert (data.train.images.shape, data.validation.images.shape) == (
        (train_count, 32, 32, 3),
        (len(written), 32, 32, 3),
    )
    np.testing.assert_allclose(data.train.images.mean((0, 1, 2)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(data.train.images.std((0, 1, 2)), np.ones(3), atol=1e-5)

    found = (
        np.concatenate([data.train.images, data.validation.images]),
        np.concatenate([data.train.labels, data.validation.labels]),
    )
    pixels = np.empty(found[0].shape, np.uint8)
    for channel in range(3):
        standardized = np.asarray(data.test.images[..., channel])
        slope, offset = np.polyfit(standardized.ravel(), test_images[:, channel].ravel(), 1)
        np.testing.assert_allclose(slope * standardized + offset, test_images[:, channel], atol=0.01)
        pixels[..., channel] = np.rint(slope * found[0][..., channel] + offset)
    expected = {
        (int(y), x.transpose(1, 2, 0).tobytes()) for xs, ys in written.values() for x, y in zip(xs, ys, strict=True)
    }
    assert {(int(y), x.tobytes()) for x, y in zip(pixels, found[1], strict=True)} == expected


def test_trains_on_cifar(tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path, "cifar100_binary", images_per_file=20)
    settings = ["--optimizer", "sgd", "--seeds", "1", "--epochs", "1", "--batch-size", "4", "--train-size", "8"]
    train_digits.main([*settings, "--widths", "4", "--data", str(tmp_path), "--output", str(tmp_path / "output")])
    summary = json.loads((tmp_path / "output" / "cifar100.json").read_text())
    assert summary["sgd"]["steps"] == 2
    np.testing.assert_allclose(summary["sgd"]["train_loss"], np.log(100), rtol=0.3)
    assert (tmp_path / "output" / "cifar100.png").is_file()


def test_refuses_a_pickle_that_runs_code_and_incomplete_archives(tmp_path: pathlib.Path) -> None:
    write_archive(tmp_path, "cifar10_pickle", images_per_file=2)
    (tmp_path / "data_batch_3").write_bytes(b"\x80\x02cos\nsystem\n(U\x04truetR.")
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system"):
        image_data.load(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        image_data.load(tmp_path)
    write_archive(tmp_path, "cifar10_binary", images_per_file=2)
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x00" * 3074)
    with pytest.raises(ValueError, match=r"records of 1 \+ 3072 bytes, got 3074"):
        image_data.load(tmp_path)


def test_refuses_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="train_size must leave"):
        image_data.load(train_size=1297)
    data = image_data.load()
    with pytest.raises(ValueError, match=r"batch_size must lie between 1 and the 300"):
        training.run_on(data, METHODS["sgd"], epochs=1, batch_size=301)

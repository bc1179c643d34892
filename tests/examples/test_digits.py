"""README's main command trains, shows its progress where it is piped, and says where the figure is."""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import train_digits
from digits import data, network, report, training
from digits.methods import METHODS

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.research
def test_trains_and_reports(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    names = ["kl_shampoo", "adamw"]
    train_digits.main(["--methods", *names, "--seeds", "2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in (tmp_path / "digits.md").read_text().splitlines()[2:]]
    picture = matplotlib.image.imread(tmp_path / "digits.png")[..., :3]
    for name, (label, error, loss, _, _) in zip(names, rows, strict=True):
        assert label == f"| {METHODS[name].label}"
        assert f"│ {METHODS[name].label}" in printed
        assert error in printed
        assert float(error.split()[0]) < 4
        assert float(loss) < 0.12
        color = matplotlib.colors.to_rgb(METHODS[name].color)
        assert (np.abs(picture - color).max(axis=-1) < 0.02).sum() > 100
    assert int(rows[0][3]) <= 72
    assert 102 <= int(rows[1][3]) <= 120  # in the last epochs it hardly falls


@pytest.mark.contract
def test_one_epoch_shows_where_everything_is(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(train_digits, "PRINT_EVERY", 1)
    train_digits.main(["--methods", "sgd", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)])
    first, line, *rest = capsys.readouterr().out.splitlines()
    assert first == "1 method, 1 seed: about 13 s on two processor cores"
    assert line.startswith("SGD with momentum: epoch 1 of 1, loss 2.")
    assert max(map(len, rest[:-2])) <= 80
    assert "…" not in "".join(rest)
    assert str(tmp_path / "digits.png") in rest[-2]
    assert str(tmp_path / "digits.md") in rest[-1]
    assert (tmp_path / "digits.png").is_file()


@pytest.mark.parametrize("name", METHODS)
def test_tuned_settings_make_a_descent_step(name: str) -> None:
    optimizer = METHODS[name].optimizer(steps=10)
    params = {"weight": jnp.zeros(3)}
    state = optimizer.init(params)
    for _ in range(2):  # the warm-up's first step is zero
        updates, state = jax.jit(optimizer.update)({"weight": jnp.array([1.0, -2.0, 0.0])}, state, params)
    np.testing.assert_array_equal(np.sign(updates["weight"]), [-1, 1, 0])


def test_learning_rates_warm_up_and_fall_to_zero_by_a_cosine() -> None:
    steps = jnp.array([0, 5, 10, 55, 100])
    expected = [0, 0.25, 0.5, 0.25, 0]
    np.testing.assert_allclose(jax.vmap(training.warmup_cosine(0.5, 100))(steps), expected, atol=1e-6)


def test_steps_to_a_loss_are_those_of_the_seeds_mean() -> None:
    loss, error = np.array([[4.0, 2.0], [1.0, 3.0], [0.0, 1.0]]), np.array([[0.5, 0.5], [0.2, 0.3], [0.1, 0.2]])
    history = report.History(np.array([6, 12, 18]), loss, np.array([6, 12, 18]), error, 0.0)
    assert report.steps_to(history, 2.0) == 12
    assert report.steps_to(history, 0.4) is None
    summary = report.summarize({"sgd": history})["sgd"]
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
        return network.convolve_patches(images, kernel, (1, 1), "SAME", **settings), expected

    actual, expected = both(images, kernel)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    with pytest.raises(NotImplementedError, match="strides"):
        network.convolve_patches(images, kernel, (2, 2), "SAME", **settings)


def test_splits_are_disjoint_and_standardized_by_the_training_images() -> None:
    digits = data.load()
    rows = [np.asarray(split.images).reshape(len(split.labels), -1) for split in digits]
    assert [len(part) for part in rows] == [300, 500, 997]
    assert len({row.tobytes() for part in rows for row in part}) == 1797
    np.testing.assert_allclose([rows[0].mean(), rows[0].std()], [0, 1], atol=1e-5)
    with pytest.raises(ValueError, match="train_size must be below 1297, got 1297"):
        data.load(train_size=1297)

"""The ladder's references follow their formulas, and runs side by side are runs alone."""

import argparse
import dataclasses
import gzip
import json
import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import machine
from ladder import data, models, probe, references, report
from ladder.methods import parse
from ladder.train import PIECES, Program, Task

pytestmark = pytest.mark.usefixtures("standard_promotion")

COMMAND = pathlib.Path(machine.__file__).parents[1] / "ladder.py"
TINY = models.Decoder(layers=1, width=8, heads=2, context=8, batch=16)


def make_task() -> Task:
    tokens = np.random.default_rng(0).integers(97, 100, 4000).astype(np.uint8)
    return Task(TINY, jnp.asarray(tokens), TINY.validation(tokens[:200], 16), PIECES, 16, weight_decay=0.1)


def gradients(steps: int, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(1)
    left, right = (np.exp(rng.uniform(-1, 1, (d, 1))) * rng.normal(size=(d, d)) for d in shape)
    return left @ rng.normal(size=(steps, *shape)) @ right


def directions(tx: optax.GradientTransformation, samples: np.ndarray) -> list[np.ndarray]:
    state, update, result = tx.init({"a": jnp.zeros(samples.shape[1:])}), jax.jit(tx.update), []
    for sample in samples:
        direction, state = update({"a": jnp.asarray(sample, jnp.float32)}, state)
        result.append(np.asarray(direction["a"], np.float64))
    return result


def power(s: np.ndarray, exponent: float) -> np.ndarray:
    values, basis = np.linalg.eigh(s)
    return basis * values**exponent @ basis.T


def test_spellings_make_grids_and_errors_name_the_options():
    method = parse("muon:rms=0.2/0.4,blocks=64,lr=1e-3/2e-3")
    assert (method.spelling, method.options) == ("muon:rms=0.2/0.4,blocks=64", {"blocks": 64})
    runs = method.grid((9.0,), 3)
    np.testing.assert_allclose(runs["learning_rate"], [1e-3] * 6 + [2e-3] * 6, rtol=1e-6)
    np.testing.assert_allclose(runs["rms"], 2 * ([0.2] * 3 + [0.4] * 3), rtol=1e-6)
    assert runs["seed"].tolist() == 4 * [0, 1, 2]
    with pytest.raises(ValueError, match="adamw takes the options lr, b1, b2, got 'rms'"):
        parse("adamw:rms=1")
    with pytest.raises(ValueError, match=r"must be one of adamw, muon, .*, got 'sgd'"):
        parse("sgd")
    losses = np.array([4.0, 2.0, 3.0, 1.0])
    assert report._share_to(2.0, losses) == pytest.approx((2 + 0.5 + 0.5) / 4)  # the first dip does not last
    assert report._share_to(0.5, losses) is None


def test_online_kl_shampoo_follows_its_recursion_in_float64():
    m, n, decay = 12, 8, 0.95
    samples = gradients(15, (m, n))
    got = directions(references.okls(rms=None, damping=0.0), samples)
    first = lambda g: np.sqrt(len(g) / g.shape[1]) / np.linalg.norm(g) * g @ g.T
    start = lambda g: first(g) + np.linalg.norm(first(g)) / np.sqrt(len(g)) * np.eye(len(g))
    rows, columns, average = start(samples[0]), start(samples[0].T), np.zeros((m, n))
    for count, g in enumerate(samples):
        if count:
            whitened = g @ power(columns, -0.5), power(rows, -0.5) @ g
            rows = decay * rows + (1 - decay) / n * whitened[0] @ whitened[0].T
            columns = decay * columns + (1 - decay) / m * whitened[1].T @ whitened[1]
        average = decay * average + (1 - decay) * g
        nesterov = decay * average + (1 - decay) * g
        expected = power(rows, -0.5) @ nesterov @ power(columns, -0.5)
        np.testing.assert_allclose(got[count], expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.research
def test_soap_follows_its_formulas_in_float64():
    samples = gradients(12, (6, 5))
    got = directions(references.soap(refresh_every=4, eps=0.0), samples)
    g = samples[0]
    rows, columns, average, square = g @ g.T, g.T @ g, np.zeros_like(g), np.zeros_like(g)

    def renew(s: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(-np.diag(basis.T @ s @ basis))
        return np.linalg.qr((s @ basis)[:, order])[0], order

    bases = [np.eye(6), np.eye(5)]
    for _ in range(10):
        bases = [renew(s, basis)[0] for s, basis in zip((rows, columns), bases, strict=True)]
    assert np.all(got[0] == 0)
    for count, g in enumerate(samples[1:], 1):
        average, rotated = 0.95 * average + 0.05 * g, bases[0].T @ g @ bases[1]
        square = 0.95 * square + 0.05 * rotated**2
        correction = 1 - 0.95**count
        adam = (bases[0].T @ average @ bases[1] / correction) / np.sqrt(square / correction)
        np.testing.assert_allclose(got[count], bases[0] @ adam @ bases[1].T, atol=2e-2)
        rows, columns = 0.95 * rows + 0.05 * g @ g.T, 0.95 * columns + 0.05 * g.T @ g
        if count % 4 == 0:
            (left, down), (right, across) = renew(rows, bases[0]), renew(columns, bases[1])
            bases, square = [left, right], square[down][:, across]


@pytest.mark.research
def test_muon_orthogonalizes_each_block_and_scales_each_parameter():
    tx = references.muon(rms=0.3, blocks=4)
    (direction,) = directions(tx, gradients(1, (8, 4)))
    assert np.sqrt(np.mean(direction**2)) == pytest.approx(0.3, rel=1e-5)
    values = np.linalg.svd(direction.reshape(2, 4, 4), compute_uv=False)
    assert values.max() / values.min() < 2  # the quintic leaves singular values between 0.7 and 1.2


@pytest.mark.research
def test_runs_side_by_side_are_runs_alone():
    task = make_task()
    program = Program(task, parse("adamw:b1=0.5/0.9"), (3e-3, 1e-2), 2)
    result = program.train()
    run = {name: values[-1] for name, values in program.runs.items()}
    assert run["b1"] == np.float32(0.9)
    tx = optax.adamw(lambda count: 1e-2 * task.rate(count), 0.9, 0.95, weight_decay=0.1)
    params = TINY.init(jax.random.key(1))
    state, losses = tx.init(params), []
    gradient = jax.jit(jax.value_and_grad(lambda p, batch: TINY.measure(p, batch)["loss"]))
    for count in range(task.steps):
        batch = TINY.draw(task.train, jax.random.fold_in(jax.random.key(1 + 2**20), count), 16)
        loss, gradients_ = gradient(params, batch)
        updates, state = tx.update(gradients_, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    np.testing.assert_allclose(result.train[-1], losses, rtol=1e-4)
    valid = np.mean([TINY.measure(params, batch)["loss"] for batch in task.valid])
    assert result.valid[-1, -1] == pytest.approx(valid, rel=1e-4)


@pytest.mark.research
def test_side_by_side_a_refresh_is_still_a_branch():
    task = make_task()
    program = Program(task, parse("sirf_muon"), (1e-3,), 2)
    assert "conditional" in program._advance.as_text()
    assert np.all(np.isfinite(program.train().valid))


@pytest.mark.research
def test_the_command_writes_table_record_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "0.2M", TINY)
    monkeypatch.setattr(data, "VALIDATION_BYTES", 300)
    for index in range(200):
        (tmp_path / f"{index}.c").write_text(f"int x{index} = {index};\n" * 20)
    arguments = ["--text", str(tmp_path), "--steps", "40", "--batch", "16", "--learning-rates", "1e-3", "1e-2"]
    arguments += ["--methods", "adamw", "muon:rms=0.2/0.4", "--seeds", "2", "--output", str(tmp_path), "--name", "a"]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments])
    runpy.run_path(str(COMMAND), run_name="__main__")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"]["tokens_per_hidden_parameter"] == pytest.approx(40 * 16 / 768, rel=1e-3)
    names = ["adamw", "adamw", "muon:rms=0.2", "muon:rms=0.4", "muon:rms=0.2", "muon:rms=0.4"]
    assert [entry["name"] for entry in record["records"]] == names
    for entry in record["records"]:
        assert np.shape(entry["valid_losses"]) == (2, 4)
        assert entry["valid_loss"] == pytest.approx(np.mean(entry["valid_losses"], 0)[-1], rel=1e-4)
    assert (tmp_path / "a.png").exists()
    assert "muon:rms=0.4" in capsys.readouterr().out


@pytest.mark.research
def test_images_are_read_and_a_missing_folder_is_a_clear_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--size", "conv", "--images", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(COMMAND), run_name="__main__")
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels, labels = rng.integers(0, 256, (40, 28, 28)), rng.integers(0, 10, 40)
        for name, header, array in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            content = bytes(header) + array.astype(np.uint8).tobytes()
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    _, valid = data.read_images(tmp_path)
    np.testing.assert_array_equal(valid.labels, labels)
    network = models.MODELS["conv"]
    assert 250_000 < network.hidden_size < 350_000
    params = network.init(jax.random.key(0))
    batches = network.validation(valid, 20)
    loss = jax.jit(network.measure)(params, jax.tree.map(lambda x: x[0], batches))["loss"]
    assert 2 < loss < 4
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 5))
    x = jax.random.normal(jax.random.key(2), (1, 8, 8, 2))
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)
    np.testing.assert_allclose(models._convolve(x, kernel, 2), expected, atol=1e-4)


@pytest.mark.research
def test_the_probe_finds_a_planted_signal_and_ranks():
    rng, (m, n) = np.random.default_rng(0), (10, 20)
    noise = rng.normal(size=(400, m, n))
    mean = np.zeros((m, n))
    mean[0] = 2.0
    stack = lambda rows: references.MatricesState(
        jnp.zeros([], jnp.int32),
        {f"{m}x{n}": references.OnlineState(None, rows[None], jnp.eye(n)[None], None, None)},
    )
    rows = np.diag(np.where(np.arange(m) < 2, 4.0, 1.0))  # the signal is in the top fifth
    found = probe._factors(stack(rows), stack(1.5 * rows), {"a": noise + mean})
    assert found["drift"] == pytest.approx((0.5 + 0) / 2, rel=1e-5)
    part = np.diag(rows) / np.trace(rows)
    assert found["rank"] == pytest.approx((np.exp(-part @ np.log(part)) / m + 1) / 2, rel=1e-5)
    assert found["signal 5/5"] == pytest.approx(2.0, rel=0.1)  # half of its entries have a squared mean of 4
    assert abs(found["signal 1/5"]) < 0.05


@pytest.mark.research
def test_the_probe_compares_directions_along_one_run(tmp_path):
    task = dataclasses.replace(make_task(), steps=400, weight_decay=0.0)
    options = argparse.Namespace(methods=["adamw", "muon"], learning_rates=[1e-3], name="a", output=tmp_path, size="-")
    probe.run(task, {"size": "-", "steps": 400, "batch": 16}, options)
    records = json.loads((tmp_path / "a.json").read_text())["records"]
    assert [record["step"] for record in records] == [20, 60, 120, 240, 360]
    assert records[0]["gain adamw"] > 0.1  # at first all batches agree on which bytes there are
    assert all(abs(record["gain muon"]) <= 1 and 0 < record["rank"] <= 1 for record in records)

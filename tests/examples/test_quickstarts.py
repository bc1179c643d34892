"""Every example is one short file that runs; that it trains well is tested by `pytest -m research`, at full length."""

import importlib
import pathlib

import numpy as np
import pytest
from checks import in_contract

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
QUICKSTARTS = {
    "nnx_quickstart": 0.06,
    "linen_quickstart": 0.08,
    "equinox_quickstart": 0.09,
    "custom_rule": 0.1,
}  # most test error

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it_and_how_long_it_takes(path: pathlib.Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    docstring = text.split('"""')[1]
    assert f"python examples/{path.name}" in docstring
    assert "on two processor cores" in docstring.replace("\n", " ")


@pytest.mark.parametrize(
    "name",
    [
        "custom_rule",  # the nnx loop is README's, too
        in_contract("linen_quickstart"),
        in_contract("equinox_quickstart"),
    ],
)
def test_an_epoch_runs(name: str, capsys: pytest.CaptureFixture) -> None:
    error = importlib.import_module(name).main(epochs=1)
    assert error < 0.95
    assert f"test error {100 * error:.2f} %" in capsys.readouterr().out


@pytest.mark.research
@pytest.mark.parametrize("name", QUICKSTARTS)
def test_a_quickstart_learns_the_digits(name: str) -> None:
    assert importlib.import_module(name).main() < QUICKSTARTS[name]


@pytest.mark.contract
def test_both_optimizers_start_from_the_same_loss(capsys: pytest.CaptureFixture) -> None:
    losses = importlib.import_module("from_adamw").main(steps=4, every=2)
    first, second = losses.values()
    assert first[0] == second[0]
    assert np.abs(first[1:] - second[1:]).min() > 1e-4
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["2", "4"]
    np.testing.assert_allclose([float(cell) for cell in lines[1][1:]], [first[2:].mean(), second[2:].mean()], atol=1e-5)


@pytest.mark.research
def test_from_adamw_ends_lower() -> None:
    losses = importlib.import_module("from_adamw").main()
    assert losses["SIRF-Shampoo"][-30:].mean() < losses["AdamW"][-30:].mean()

"""README's Python examples run, and its training loops learn."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
LOOPS = [code for code in EXAMPLES if "train_step" in code]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2
    assert len(LOOPS) == 1


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    if code in LOOPS:
        images = jax.random.normal(jax.random.key(0), (32, 64))
        labels = jnp.arange(32) % 10
        losses = [float(names["train_step"](names["model"], names["optimizer"], images, labels)) for _ in range(20)]
        assert losses[0] > 2
        assert losses[-1] < 0.5 * losses[0]

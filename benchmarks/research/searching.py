"""What the random searches share: ranges, methods, and their records as JSON and as a table."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from digits.training import warmup_cosine
from jax.typing import ArrayLike
from progress import console
from rich.table import Table

DIGITS = 5  # of a number in a record

Hyperparameters = Mapping[str, ArrayLike]
Settings = Mapping[str, np.ndarray]  # [trials] values of each hyperparameter
Outcomes = Mapping[str, np.ndarray]  # [trials, seeds] of what was measured


class Range(NamedTuple):
    """A log-uniform distribution of a hyperparameter, or of one minus it."""

    low: float
    high: float
    of_one_minus: bool = False

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Returns n draws."""
        draws = np.exp(rng.uniform(np.log(self.low), np.log(self.high), n))
        return 1 - draws if self.of_one_minus else draws

    def __str__(self) -> str:
        low, high = (1 - self.high, 1 - self.low) if self.of_one_minus else (self.low, self.high)
        return f"{low:.4g} to {high:.4g}"


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that it can be static
class Method:
    """An optimizer: `build(learning_rate, batch_size, **others)` and a range for each hyperparameter."""

    label: str
    build: Callable[..., optax.GradientTransformation]
    ranges: Mapping[str, Range]

    def optimizer(
        self, hyperparameters: Hyperparameters, steps: ArrayLike, batch_size: int
    ) -> optax.GradientTransformation:
        """Returns the transformation for a run of `steps` steps on losses that average `batch_size` terms."""
        others = dict(hyperparameters)
        schedule = warmup_cosine(others.pop("learning_rate"), steps)
        return self.build(schedule, batch_size=batch_size, **others)

    def draw(self, trials: int) -> dict[str, np.ndarray]:
        """Returns the settings of a search: the same ones at every call."""
        rng = np.random.default_rng(0)
        return {name: limits.draw(rng, trials).astype(np.float32) for name, limits in self.ranges.items()}


def rows(settings: Settings, outcomes: Outcomes) -> list[dict[str, float | None]]:
    """Returns one dictionary per trial, of its settings and the means of its outcomes (None if not finite)."""
    columns = dict(settings) | {name: values.mean(axis=1) for name, values in outcomes.items()}
    return [
        {name: float(values[i]) if np.isfinite(values[i]) else None for name, values in columns.items()}
        for i in range(len(next(iter(columns.values()))))
    ]


def rounded(value: Any) -> Any:
    """Returns the numbers in lists and dictionaries to `DIGITS` digits, and None for those that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
    return value


def to_json(record: Mapping[str, Any]) -> str:
    """Returns JSON of rounded numbers, with one line for each list of numbers and for each innermost dictionary."""
    return _to_json(rounded(record), "") + "\n"


def _to_json(value: Any, indent: str) -> str:
    if not any(map(_holds_dictionaries, _entries(value))):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_to_json(entry, inner)}" for key, entry in value.items()]
    else:
        lines = [_to_json(entry, inner) for entry in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{last}"


def _entries(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def _holds_dictionaries(value: Any) -> bool:
    return isinstance(value, dict) or any(map(_holds_dictionaries, _entries(value)))


def print_search(method: Method, record: Mapping[str, Any], seconds: float) -> None:
    """Prints the chosen settings beside the ranges they were drawn from."""
    title = f"{method.label}: {len(record['trials'])} trials, {record['non_finite']} non-finite, {seconds:.0f} s"
    table = Table("hyperparameter", "range", title=title, title_justify="left")
    table.add_column("chosen", justify="right")
    for name, limits in method.ranges.items():
        table.add_row(name, str(limits), f"{record['chosen'][name]:.4g}")
    if "validation_error" in record:
        table.add_row("validation error %", "", f"{100 * record['validation_error']:.2f}")
    if "validation_loss" in record:
        table.add_row("validation loss", "", f"{np.array(record['validation_loss'], float).mean():.3f}")
    console.print(table)

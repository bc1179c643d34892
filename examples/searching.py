"""What the examples' random searches share: ranges, methods, the learning rate's schedule, and their record as JSON."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.typing import ArrayLike

WARMUP_FRACTION = 0.1
SCHEDULE_RESOLUTION = 1000

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


def adamw(learning_rate: optax.Schedule, batch_size: ArrayLike, **others: ArrayLike) -> optax.GradientTransformation:
    """Returns `optax.adamw`."""
    del batch_size
    return optax.adamw(learning_rate, **others)


def warmup_cosine(learning_rate: ArrayLike, steps: ArrayLike) -> optax.Schedule:
    """Returns the schedule that all methods share: a linear warm-up, then a cosine to zero; both may be traced."""
    unit = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, int(WARMUP_FRACTION * SCHEDULE_RESOLUTION), SCHEDULE_RESOLUTION
    )  # Optax's own schedule wants Python numbers as its peak and its length
    return lambda count: learning_rate * unit(SCHEDULE_RESOLUTION * (count / steps))


def rows(settings: Settings, outcomes: Outcomes) -> list[dict[str, float | None]]:
    """Returns one dictionary per trial, of its settings and the means of its outcomes (None if not finite)."""
    columns = dict(settings) | {name: values.mean(axis=1) for name, values in outcomes.items()}
    return [
        {name: float(values[i]) if np.isfinite(values[i]) else None for name, values in columns.items()}
        for i in range(len(next(iter(columns.values()))))
    ]


def to_json(record: Mapping[str, Any]) -> str:
    """Returns JSON with one line for each entry, and for each trial."""
    lines = []
    for key, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"

"""Trains all runs of one method side by side: one program, compiled before the clock starts."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ladder.methods import Method
from ladder.models import Model

PIECES = 40
"""A run is trained, and its training loss is averaged, in so many pieces. Validation comes after every tenth."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What every method trains alike.

    Attributes:
      model: the network.
      train: its data for training, arrays on the device.
      valid: its validation set in batches, arrays on the device.
      steps: a multiple of `PIECES`.
      batch: tokens or images of a step.
      weight_decay: decoupled, of every parameter.
    """

    model: Model
    train: Any
    valid: Any
    steps: int
    batch: int
    weight_decay: float = 0.0

    def rate(self, count: jax.Array) -> jax.Array:
        """Returns the part of the learning rate at a step: 5 % of the run warm up, then a cosine falls to 5 %."""
        warmup = max(1, self.steps // 20)
        return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps, 0.05)(count)


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs of one method.

    Attributes:
      method: of all runs.
      runs: learning rates, traced options and seeds, each an array [runs].
      train: mean training losses of the pieces, [runs, pieces].
      valid: validation losses at the quarters of the run, [runs, quarters].
      error: validation errors, likewise.
      compile_seconds: before the clock starts.
      seconds: of training all runs, without validation.
      steps: of each run.
    """

    method: Method
    runs: dict[str, np.ndarray]
    train: np.ndarray
    valid: np.ndarray
    error: np.ndarray
    compile_seconds: float
    seconds: float
    steps: int


def run_axes(state: Any) -> Any:
    """Returns which axis of a state's leaves the runs have: none of a counter, so that a branch stays a branch.

    `jax.vmap` makes a selection of a `jax.lax.cond` whose predicate differs between runs: each step would refresh.
    """
    is_counter = lambda path: getattr(path[-1], "name", "") in ("count", "step")
    return jax.tree_util.tree_map_with_path(lambda path, _: None if is_counter(path) else 0, state)


class Program:
    """The compiled program of one method on one task."""

    def __init__(self, task: Task, method: Method, learning_rates: tuple[float, ...], seeds: int) -> None:
        """Compiles it; may be called from several threads at once."""
        self.task, self.method = task, method
        self.runs = method.grid(learning_rates, seeds)
        start = time.perf_counter()
        runs = jax.tree.map(jnp.asarray, self.runs)
        one = jax.tree.map(lambda array: jax.ShapeDtypeStruct((), array.dtype), runs)
        self._axes = run_axes(jax.eval_shape(self._init, one))
        self._start = jax.jit(jax.vmap(self._init, out_axes=self._axes)).lower(runs).compile()
        state = jax.eval_shape(jax.vmap(self._init, out_axes=self._axes), runs)
        shared = (task.train, jnp.int32(0))
        self._advance = jax.jit(self._train_piece, donate_argnums=0).lower(state, runs, *shared).compile()
        self._validate = jax.jit(self._measure).lower(state[0], task.valid).compile()
        self.compile_seconds = time.perf_counter() - start

    def _optimizer(self, run: dict[str, jax.Array]) -> optax.GradientTransformation:
        traced = {name: run[name] for name in self.method.traced}
        schedule = lambda count: run["learning_rate"] * self.task.rate(count)
        return self.method.build(schedule, self.task.weight_decay, traced)

    def _init(self, run: dict[str, jax.Array]) -> tuple[Any, Any]:
        params = self.task.model.init(jax.random.key(run["seed"]))
        return params, self._optimizer(run).init(params)

    def _step(self, state: Any, run: dict[str, jax.Array], data: Any, count: jax.Array) -> tuple[Any, jax.Array]:
        params, optimizer_state = state
        model = self.task.model
        # The same batches for every method and learning rate, of another key than the parameters.
        key = jax.random.fold_in(jax.random.key(run["seed"] + 2**20), count)
        batch = model.draw(data, key, self.task.batch)
        loss, gradients = jax.value_and_grad(lambda p: model.measure(p, batch)["loss"])(params)
        updates, optimizer_state = self._optimizer(run).update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    def _train_piece(self, states: Any, runs: dict[str, jax.Array], data: Any, first: jax.Array) -> tuple[Any, Any]:
        step = jax.vmap(self._step, (self._axes, 0, None, None), (self._axes, 0))
        length = self.task.steps // PIECES
        states, losses = jax.lax.scan(
            lambda states, count: step(states, runs, data, count), states, first + jnp.arange(length)
        )
        return states, jnp.mean(losses, 0)

    def _measure(self, params: Any, valid: Any) -> dict[str, jax.Array]:
        of_batch = jax.vmap(self.task.model.measure, (0, None))
        measured = jax.lax.map(functools.partial(of_batch, params), valid)
        return jax.tree.map(lambda values: jnp.mean(values, 0), measured)

    def train(self, watch: Callable[[], None] = lambda: None) -> Result:
        """Returns the result of all runs. `watch` is called after each piece; what it raises ends the training."""
        runs = jax.tree.map(jnp.asarray, self.runs)
        states, train, measured, seconds = self._start(runs), [], [], 0.0
        jax.block_until_ready(states)
        for piece in range(PIECES):
            start = time.perf_counter()
            first = jnp.int32(piece * (self.task.steps // PIECES))
            states, losses = self._advance(states, runs, self.task.train, first)
            train.append(np.asarray(losses))
            seconds += time.perf_counter() - start
            if (piece + 1) % (PIECES // 4) == 0:
                measured.append(jax.tree.map(np.asarray, self._validate(states[0], self.task.valid)))
            watch()
        column = lambda name: np.stack([of_quarter[name] for of_quarter in measured], 1)
        return Result(
            self.method,
            self.runs,
            np.stack(train, 1),
            column("loss"),
            column("error"),
            self.compile_seconds,
            seconds,
            self.task.steps,
        )

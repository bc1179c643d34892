"""Training runs, side by side in one compiled program: hyperparameters and seeds are its arguments."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from searching import Hyperparameters, Method

from experiments.tasks import Data, Split, Task

POINTS = 10  # of every curve
EVALUATED_AT_ONCE = 100


class Outcome(NamedTuple):
    """What a run measured; a run that diverged has errors of one and losses that are not finite."""

    train_loss: jax.Array  # [POINTS], means over a tenth of the steps each
    validation_error: jax.Array  # [POINTS], after each tenth
    validation_loss: jax.Array
    test_error: jax.Array
    test_loss: jax.Array


def logits_of(task: Task, params: nnx.State, inputs: jax.Array) -> jax.Array:
    """Returns the logits of a network with these parameters."""
    structure = nnx.graphdef(nnx.eval_shape(lambda: task.model(nnx.Rngs(0))))
    return nnx.merge(structure, params)(inputs, *task.extra())


def mean_loss(task: Task, params: nnx.State, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropy, averaged over all targets."""
    logits = logits_of(task, params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def evaluate(task: Task, params: nnx.State, split: Split) -> tuple[jax.Array, jax.Array]:
    """Returns error rate and mean loss on a whole split."""

    def of_one(example: Split) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(task, params, example.inputs[None])[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, example.targets)
        return jnp.mean(logits.argmax(axis=-1) != example.targets, dtype=jnp.float32), losses.mean()

    errors, losses = jax.lax.map(of_one, split, batch_size=min(EVALUATED_AT_ONCE, len(split.targets)))
    return jnp.where(jnp.isfinite(losses.mean()), errors.mean(), 1.0), losses.mean()


def train(task: Task, method: Method, hyperparameters: Hyperparameters, seed: ArrayLike, data: Data) -> Outcome:
    """Trains from one seed, which draws initial parameters and mini-batches."""
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    params = nnx.state(task.model(nnx.Rngs(init_key)), nnx.Param)
    terms, available = task.terms(data), len(data.train.inputs)
    optimizer = method.optimizer(hyperparameters, task.steps, terms)

    def step(carry: tuple, count: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = carry
        batch = data.train
        if terms < available:
            rows = jax.random.randint(jax.random.fold_in(batch_key, count), (terms,), 0, available)
            batch = Split(batch.inputs[rows], batch.targets[rows])
        loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(task, params, *batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def part(carry: tuple, counts: jax.Array) -> tuple[tuple, tuple[jax.Array, ...]]:
        carry, losses = jax.lax.scan(step, carry, counts)
        return carry, (losses.mean(), *evaluate(task, carry[0], data.validation))

    counts = jnp.arange(task.steps).reshape(POINTS, -1)
    (params, _), (train_loss, errors, losses) = jax.lax.scan(part, (params, optimizer.init(params)), counts)
    return Outcome(train_loss, errors, losses, *evaluate(task, params, data.test))


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_together(
    task: Task, method: Method, hyperparameters: dict[str, jax.Array], seeds: jax.Array, data: Data
) -> Outcome:
    """Returns `train` of hyperparameters [runs] and seeds [runs]."""
    return jax.vmap(functools.partial(train, task, method), in_axes=(0, 0, None))(hyperparameters, seeds, data)

"""One training run as pure functions of hyperparameters and seed, for `jax.vmap` over either and for `jax.jit`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from convnet import WIDTHS, ConvNet
from flax import nnx
from image_data import ImageData, Split
from jax.typing import ArrayLike
from searching import Hyperparameters, Method

# So few that methods differ: after 50 epochs all have learnt the 300 digits by heart, and err alike.
EPOCHS = 20
BATCH_SIZE = 50
EVALUATION_BATCH = 256


class TrainingState(NamedTuple):
    """What a training run carries from step to step."""

    params: nnx.State
    opt_state: optax.OptState


class Evaluation(NamedTuple):
    """Error rate in [0, 1] and mean cross-entropy on one split."""

    error: jax.Array
    loss: jax.Array


class Network(NamedTuple):
    """What fixes the network besides its parameters."""

    channels: int
    classes: int
    widths: tuple[int, ...]

    def model(self, key: jax.Array) -> ConvNet:
        """Returns a newly initialised network."""
        return ConvNet(self.channels, self.classes, self.widths, rngs=nnx.Rngs(key))

    def with_params(self, params: nnx.State) -> ConvNet:
        """Returns a network with these parameters."""
        structure = nnx.graphdef(nnx.eval_shape(lambda: self.model(jax.random.key(0))))
        return nnx.merge(structure, params)


class Run(NamedTuple):
    """What is static about a training run: it compiles into the program, whereas images and numbers are arguments."""

    method: Method
    network: Network
    train_size: int
    epochs: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole mini-batches in an epoch; the images that remain are left out of that epoch."""
        return self.train_size // self.batch_size

    def optimizer(self, hyperparameters: Hyperparameters) -> optax.GradientTransformation:
        """Returns the method's transformation; the network's loss averages `batch_size` terms."""
        return self.method.optimizer(hyperparameters, self.epochs * self.steps_per_epoch, self.batch_size)


def run_on(data: ImageData, method: Method, epochs: int, batch_size: int, widths: Sequence[int] = WIDTHS) -> Run:
    """Returns the run of a method on a data set."""
    train_size, *_, channels = data.train.images.shape
    if not 0 < batch_size <= train_size:
        raise ValueError(f"batch_size must lie between 1 and the {train_size} training images, got {batch_size}.")
    return Run(method, Network(channels, data.classes, tuple(widths)), train_size, epochs, batch_size)


def mean_loss(network: Network, params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy, averaged over the mini-batch: its size is the optimizer's `batch_size`."""
    logits = network.with_params(params)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnums=0)
def initial_params(network: Network, keys: jax.Array) -> nnx.State:
    """Returns parameters with one more leading axis, of the keys."""
    return jax.lax.map(lambda key: nnx.state(network.model(key), nnx.Param), keys)


def train_epoch(
    run: Run, hyperparameters: Hyperparameters, key: jax.Array, epoch: ArrayLike, split: Split, state: TrainingState
) -> tuple[TrainingState, jax.Array]:
    """Returns the state after one pass over the training images, and the mean loss of its mini-batches."""
    optimizer = run.optimizer(hyperparameters)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), run.train_size)
    batches = order[: run.steps_per_epoch * run.batch_size].reshape(run.steps_per_epoch, run.batch_size)

    def step(state: TrainingState, batch: jax.Array) -> tuple[TrainingState, jax.Array]:
        params, opt_state = state
        images, labels = split.images[batch], split.labels[batch]
        loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(run.network, params, images, labels)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return TrainingState(optax.apply_updates(params, updates), opt_state), loss

    state, losses = jax.lax.scan(step, state, batches)
    return state, losses.mean()


def evaluate(network: Network, split: Split, params: nnx.State) -> Evaluation:
    """Returns error and loss on a whole split; a network that came apart errs on every image."""
    logits_of = lambda image: network.with_params(params)(image[None])[0]
    logits = jax.lax.map(logits_of, split.images, batch_size=EVALUATION_BATCH)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    error = jnp.mean(logits.argmax(axis=-1) != split.labels, dtype=jnp.float32)
    return Evaluation(jnp.where(jnp.isfinite(loss), error, 1.0), loss)


@functools.partial(jax.jit, static_argnums=0)
def evaluate_seeds(network: Network, split: Split, params: nnx.State) -> Evaluation:
    """Returns `evaluate` of parameters that have one more leading axis."""
    return jax.vmap(functools.partial(evaluate, network, split))(params)


def train(
    run: Run, hyperparameters: Hyperparameters, params: nnx.State, key: jax.Array, split: Split, evaluated_on: Split
) -> tuple[jax.Array, Evaluation]:
    """Returns the mean loss of each epoch, [epochs], and the final evaluation."""

    def one_epoch(state: TrainingState, epoch: jax.Array) -> tuple[TrainingState, jax.Array]:
        return train_epoch(run, hyperparameters, key, epoch, split, state)

    start = TrainingState(params, run.optimizer(hyperparameters).init(params))
    state, losses = jax.lax.scan(one_epoch, start, jnp.arange(run.epochs))
    return losses, evaluate(run.network, evaluated_on, state.params)

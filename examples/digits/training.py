"""One training run as pure functions of the seed, for `jax.jit`, and for `jax.vmap` over seeds or hyperparameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from digits.data import Split
from digits.network import ConvNet

# So few that the methods differ: after 50 epochs all of them know the 300 digits by heart, and err alike.
EPOCHS = 20
BATCH_SIZE = 50
WARMUP = 0.1  # of all steps
EVALUATION_BATCH = 256


class TrainingState(NamedTuple):
    """What a training run carries from step to step."""

    params: nnx.State
    opt_state: optax.OptState


def init_params(key: jax.Array) -> nnx.State:
    """Returns the parameters of a new network."""
    return nnx.state(ConvNet(rngs=nnx.Rngs(key)), nnx.Param)


def apply(params: nnx.State, images: jax.Array) -> jax.Array:
    """Returns the logits, [n, classes], of images [n, height, width, channels]."""
    structure = nnx.graphdef(nnx.eval_shape(lambda: ConvNet(rngs=nnx.Rngs(0))))
    return nnx.merge(structure, params)(images)


def mean_loss(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy, a mean over the mini-batch: its size is the optimizer's `batch_size`."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels).mean()


def warmup_cosine(learning_rate: ArrayLike, steps: ArrayLike) -> optax.Schedule:
    """Returns the schedule of all methods: a linear warm-up, then a cosine to zero. Both arguments may be traced."""
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, int(1000 * WARMUP), 1000)
    return lambda count: learning_rate * unit(1000 * (count / steps))


def train_epoch(
    optimizer: optax.GradientTransformation, key: jax.Array, epoch: ArrayLike, train: Split, state: TrainingState
) -> tuple[TrainingState, jax.Array]:
    """Returns the state after one pass over the training images, and the mean loss of its mini-batches.

    The images are shuffled by the key and the number of the epoch; those that fill no mini-batch are left out.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(train.labels))
    batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)

    def step(state: TrainingState, batch: jax.Array) -> tuple[TrainingState, jax.Array]:
        params, opt_state = state
        loss, gradients = jax.value_and_grad(mean_loss)(params, train.images[batch], train.labels[batch])
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return TrainingState(optax.apply_updates(params, updates), opt_state), loss

    state, losses = jax.lax.scan(step, state, batches)
    return state, losses.mean()


def evaluate(split: Split, params: nnx.State) -> jax.Array:
    """Returns the error rate in [0, 1] on a whole split; a network that diverged errs on every image."""
    logits = jax.lax.map(lambda image: apply(params, image[None])[0], split.images, batch_size=EVALUATION_BATCH)
    error = jnp.mean(logits.argmax(axis=-1) != split.labels, dtype=jnp.float32)
    return jnp.where(jnp.all(jnp.isfinite(logits)), error, 1.0)

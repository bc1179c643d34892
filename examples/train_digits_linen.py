"""The training loop in flax linen with a TrainState, for one seed of RF-RMSProp on the handwritten digits.

python examples/train_digits_linen.py
"""

import argparse

import image_data
import jax
import numpy as np
import optax
import reporting
from convnet import GROUPS, WIDTHS
from flax import linen as nn
from flax.training.train_state import TrainState
from methods import tuned_settings
from searching import warmup_cosine
from training import BATCH_SIZE, EPOCHS

import rootfree_optax as rf


class ConvNet(nn.Module):
    """The network of convnet.py."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits, [n, classes], of images [n, height, width, channels]."""
        x = images
        for index, width in enumerate(WIDTHS):
            if index > 0:
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(num_groups=GROUPS)(x))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """Returns the state after one step on a mini-batch, and the loss before it."""

    def loss_fn(params: optax.Params) -> jax.Array:
        logits = state.apply_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


def main(arguments: list[str] | None = None) -> tuple[np.ndarray, float]:
    """Runs the command line and returns the training losses, [steps], and the test error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    data = image_data.load_handwritten_digits()
    steps_per_epoch = len(data.train.labels) // options.batch_size
    settings = tuned_settings("rf_rmsprop")
    schedule = warmup_cosine(settings.pop("learning_rate"), options.epochs * steps_per_epoch)
    # The loss is a mean over the mini-batch, and batch_size tells the optimizer over how many terms.
    optimizer = rf.rf_rmsprop(schedule, batch_size=options.batch_size, **settings)
    model = ConvNet(data.classes)
    params = jax.jit(model.init)(jax.random.key(options.seed), data.train.images[:1])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    rng = np.random.default_rng(options.seed)
    losses = []
    with reporting.progress_bar() as bar:
        task = bar.add_task("RF-RMSProp, linen", total=options.epochs, status="compiling")
        for _ in range(options.epochs):
            order = rng.permutation(len(data.train.labels))
            for batch in order[: steps_per_epoch * options.batch_size].reshape(steps_per_epoch, -1):
                state, loss = train_step(state, data.train.images[batch], data.train.labels[batch])
                losses.append(float(loss))
            bar.update(task, advance=1, status=f"loss {np.mean(losses[-steps_per_epoch:]):.4f}")
    predictions = jax.jit(state.apply_fn)(state.params, data.test.images).argmax(axis=-1)
    error = float((predictions != data.test.labels).mean())
    reporting.console.print(f"test error {100 * error:.2f} %")
    return np.array(losses), error


if __name__ == "__main__":
    main()

"""Trains a small network on handwritten digits in Flax nnx, with SIRF-Shampoo.

    python examples/nnx_quickstart.py

It takes about 10 seconds on two processor cores.
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import rootfree_optax as rf

BATCH_SIZE = 64


class Network(nnx.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.output = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [n, 64] to logits [n, 10]."""
        return self.output(nnx.relu(self.hidden(images)))


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Takes one step in place and returns the loss before it."""

    def loss_fn(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def error_rate(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of images that get a wrong label."""
    return (model(images).argmax(axis=-1) != labels).mean()


def main(epochs: int = 10) -> float:
    """Trains on the first 1347 of 1797 digits and returns the error rate on the others."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    model = Network(nnx.Rngs(0))
    learning_rate = optax.cosine_decay_schedule(5e-3, epochs * (1347 // BATCH_SIZE))
    tx = rf.sirf_shampoo(learning_rate, weight_decay=1e-2)  # as optax.adamw would be called
    print(rf.describe(tx, nnx.state(model, nnx.Param)), flush=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    shuffle = np.random.default_rng(0).permutation
    for epoch in range(epochs):
        for batch in shuffle(1347)[: 1347 // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            loss = train_step(model, optimizer, images[batch], labels[batch])
        error = float(error_rate(model, images[1347:], labels[1347:]))
        print(f"epoch {epoch + 1}: training loss {loss:.4f}, test error {100 * error:.2f} %", flush=True)
    return error


if __name__ == "__main__":
    main()

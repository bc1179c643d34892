"""Trains a small convolutional network on handwritten digits in Flax linen, with RF-RMSProp and a `TrainState`.

    python examples/linen_quickstart.py

It takes about 10 seconds on two processor cores.
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import rootfree_optax as rf

BATCH_SIZE = 64


class Network(nn.Module):
    """Two convolutions, then a linear classifier of all pixels' features."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [n, 8, 8, 1] to logits [n, 10]."""
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """Returns the state after one step, and the loss before it."""

    def loss_fn(params: optax.Params) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


@jax.jit
def error_rate(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of images that get a wrong label."""
    return (state.apply_fn({"params": state.params}, images).argmax(axis=-1) != labels).mean()


def main(epochs: int = 10) -> float:
    """Trains on the first 1347 of 1797 digits and returns the error rate on the others."""
    digits = load_digits()
    images, labels = (digits.images[..., np.newaxis] / 16).astype(np.float32), digits.target
    model = Network()
    params = model.init(jax.random.key(0), images[:1])["params"]
    learning_rate = optax.cosine_decay_schedule(5e-3, epochs * (1347 // BATCH_SIZE))
    tx = rf.rf_rmsprop(learning_rate, weight_decay=1e-2)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    shuffle = np.random.default_rng(0).permutation
    for epoch in range(epochs):
        for batch in shuffle(1347)[: 1347 // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            state, loss = train_step(state, images[batch], labels[batch])
        error = float(error_rate(state, images[1347:], labels[1347:]))
        print(f"epoch {epoch + 1}: training loss {loss:.4f}, test error {100 * error:.2f} %", flush=True)
    return error


if __name__ == "__main__":
    main()

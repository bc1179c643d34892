"""Trains a multilayer perceptron on handwritten digits in Equinox, with RF-AdamW.

    python examples/equinox_quickstart.py

It takes about 10 seconds on two processor cores.
"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import rootfree_optax as rf

BATCH_SIZE = 64


def mean_loss(model: eqx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy, a mean over the mini-batch."""
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(images), labels).mean()


@eqx.filter_jit
def error_rate(model: eqx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of images that get a wrong label."""
    return (jax.vmap(model)(images).argmax(axis=-1) != labels).mean()


def main(epochs: int = 10) -> float:
    """Trains on the first 1347 of 1797 digits and returns the error rate on the others."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    model = eqx.nn.MLP(64, 10, width_size=256, depth=2, key=jax.random.key(0))
    learning_rate = optax.cosine_decay_schedule(5e-3, epochs * (1347 // BATCH_SIZE))
    tx = rf.rf_adamw(learning_rate, weight_decay=1e-2)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model: eqx.Module, state: optax.OptState, images: jax.Array, labels: jax.Array):
        loss, gradients = eqx.filter_value_and_grad(mean_loss)(model, images, labels)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    shuffle = np.random.default_rng(0).permutation
    for epoch in range(epochs):
        for batch in shuffle(1347)[: 1347 // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            model, state, loss = train_step(model, state, images[batch], labels[batch])
        error = float(error_rate(model, images[1347:], labels[1347:]))
        print(f"epoch {epoch + 1}: training loss {loss:.4f}, test error {100 * error:.2f} %", flush=True)
    return error


if __name__ == "__main__":
    main()

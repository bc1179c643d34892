"""A training run with AdamW, and the same run with one name changed: learning rate, schedule and weight decay stay.

    python examples/from_adamw.py

Prints the losses of both side by side. It takes about 10 seconds on two processor cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import rootfree_optax as rf

BATCH_SIZE = 64
WIDTHS = (64, 256, 256, 10)

OPTIMIZERS = {
    "AdamW": lambda schedule: optax.adamw(schedule, 0.9, 0.95, weight_decay=0.1),
    "SIRF-Shampoo": lambda schedule: rf.sirf_shampoo(schedule, 0.9, 0.95, weight_decay=0.1),
}


def init_params(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Returns the layers' matrices and biases."""
    keys, init = jax.random.split(key, len(WIDTHS) - 1), jax.nn.initializers.he_normal()
    return [
        {"kernel": init(key, (n_in, n_out)), "bias": jnp.zeros(n_out)}
        for key, n_in, n_out in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def mean_loss(params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of a multilayer perceptron, a mean over the mini-batch."""
    x = images
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx: optax.GradientTransformation, steps: int) -> np.ndarray:
    """Returns the loss of each step's mini-batch, [steps]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)

    @jax.jit
    def train_step(params: optax.Params, state: optax.OptState, images: jax.Array, labels: jax.Array):
        loss, gradients = jax.value_and_grad(mean_loss)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = init_params(jax.random.key(0))
    state = jax.jit(tx.init)(params)
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        batch = rng.integers(0, len(images), BATCH_SIZE)
        params, state, loss = train_step(params, state, images[batch], labels[batch])
        losses.append(loss)
    return np.array(losses)


def main(steps: int = 300, every: int = 30) -> dict[str, np.ndarray]:
    """Trains with both optimizers, prints the mean losses of every few steps, and returns all of them."""
    print(f"training with {' and '.join(OPTIMIZERS)}, {steps} steps each", flush=True)
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    losses = {name: train(make(schedule), steps) for name, make in OPTIMIZERS.items()}
    print("step".rjust(6), *(name.rjust(14) for name in losses))
    for step in range(every, steps + 1, every):
        print(f"{step:6}", *(f"{values[step - every : step].mean():14.5f}" for values in losses.values()))
    return losses


if __name__ == "__main__":
    main()

"""A block rule of one's own: Adafactor's factored second moment, for blocks of any number of axes.

    python examples/custom_rule.py

A rule is the mathematics of one block. `rf.scale_by_kronecker` cuts parameters into blocks, maps the rule over all
blocks of one shape, keeps momentum, and divides the blocks over a mesh. It takes about 10 seconds on two processor
cores.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import rootfree_optax as rf

BATCH_SIZE = 64
WIDTHS = (64, 256, 10)


@dataclasses.dataclass(frozen=True)
class FactoredSecondMoment(rf.BlockRule):
    """Divides by √V, of which V ≈ v₁ ⊗ … ⊗ v_N / mean(g²)^(N−1) keeps one vector vₙ of averages of g² for each axis."""

    decay: float = 0.95
    eps: float = 1e-30

    def init(self, structures, dtypes):
        """Returns a vector of zeros for each axis."""
        return tuple(jnp.zeros(structure.dim) for structure in structures)

    def observe(self, state, gradient, *, structures, step):
        """Takes a gradient into the averages; the first few weigh alike."""
        weight = jnp.maximum(1 - self.decay, 1 / (step.count + 1))
        squares = jnp.square(gradient.astype(jnp.float32))
        axes = range(squares.ndim)
        means = [squares.mean(axis=[other for other in axes if other != axis]) for axis in axes]
        return tuple(average + weight * (mean - average) for average, mean in zip(state, means, strict=True))

    def precondition(self, state, momentum, *, gradient, structures, step):
        """Returns the momentum over the root of the second moment, and the state as it is."""
        product = functools.reduce(jnp.multiply.outer, state)
        second_moment = product / (state[0].mean() + self.eps) ** (len(state) - 1)
        return momentum / (jnp.sqrt(second_moment) + self.eps), state


def make_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the rule on matrices, in blocks of at most 128×128, and Adam on the other parameters."""
    layout = rf.Layout(block_size=128)
    rule = FactoredSecondMoment()
    return optax.chain(
        rf.scale_by_kronecker(rule, momentum=0.9, statistics_every=1, layout=layout, rest=optax.scale_by_adam()),
        optax.scale_by_learning_rate(schedule),
    )


def logits_of(params: optax.Params, images: jax.Array) -> jax.Array:
    """Returns the logits of a perceptron with one hidden layer."""
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def main(epochs: int = 10) -> float:
    """Trains on the first 1347 of 1797 digits and returns the error rate on the others."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    init, keys = jax.nn.initializers.he_normal(), jax.random.split(jax.random.key(0))
    params = {
        name: {"kernel": init(key, (n_in, n_out)), "bias": jnp.zeros(n_out)}
        for name, key, n_in, n_out in zip(("hidden", "output"), keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    }
    tx = make_optimizer(optax.cosine_decay_schedule(5e-3, epochs * (1347 // BATCH_SIZE)))
    print(rf.describe(tx, params), flush=True)

    def mean_loss(params: optax.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), labels).mean()

    @jax.jit
    def train_step(params: optax.Params, state: optax.OptState, images: jax.Array, labels: jax.Array):
        loss, gradients = jax.value_and_grad(mean_loss)(params, images, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = jax.jit(tx.init)(params)
    shuffle = np.random.default_rng(0).permutation
    for epoch in range(epochs):
        for batch in shuffle(1347)[: 1347 // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            params, state, loss = train_step(params, state, images[batch], labels[batch])
        error = float((logits_of(params, images[1347:]).argmax(axis=-1) != labels[1347:]).mean())
        print(f"epoch {epoch + 1}: training loss {loss:.4f}, test error {100 * error:.2f} %", flush=True)
    return error


if __name__ == "__main__":
    main()

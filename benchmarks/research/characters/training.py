"""One training run in segments of a few steps, of which one compiled program serves every setting, seed and length."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from searching import Hyperparameters, Method

from characters.transformer import Transformer

SEQUENCE = 64
AVERAGED = 10  # steps that one point of a training curve averages
SEGMENT = 20  # steps between two calls from Python
EVALUATION_BATCH = 32


class TrainingState(NamedTuple):
    """What a training run carries from step to step."""

    params: nnx.State
    opt_state: optax.OptState


class Network(NamedTuple):
    """What fixes the transformer besides its parameters."""

    width: int = 64
    layers: int = 2

    def model(self, key: jax.Array) -> Transformer:
        """Returns a newly initialised transformer."""
        return Transformer(self.width, self.layers, SEQUENCE, rngs=nnx.Rngs(key))

    def with_params(self, params: nnx.State) -> Transformer:
        """Returns a transformer with these parameters."""
        return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: self.model(jax.random.key(0)))), params)


class Run(NamedTuple):
    """What is static about a training run: it compiles into the program, whereas text and numbers are arguments."""

    method: Method
    network: Network = Network()
    batch_size: int = 32  # sequences


def mean_loss(network: Network, params: nnx.State, text: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each next character, averaged over sequences [n, sequence + 1]."""
    logits = network.with_params(params)(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:].astype(jnp.int32)).mean()


@functools.partial(jax.jit, static_argnums=0)
def initial_params(network: Network, key: jax.Array) -> nnx.State:
    """Returns newly initialised parameters."""
    return nnx.state(network.model(key), nnx.Param)


@functools.partial(jax.jit, static_argnums=0)
def start(run: Run, hyperparameters: Hyperparameters, params: nnx.State) -> TrainingState:
    """Returns the state before the first step."""
    optimizer = run.method.optimizer(hyperparameters, SEGMENT, run.batch_size)  # whose length no state depends on
    return TrainingState(params, optimizer.init(params))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def train_segment(
    run: Run,
    hyperparameters: Hyperparameters,
    steps: ArrayLike,
    first: ArrayLike,
    key: jax.Array,
    train: jax.Array,
    state: TrainingState,
) -> tuple[TrainingState, jax.Array]:
    """Returns the state after `SEGMENT` steps from step `first` of `steps`, and the mean loss of each `AVERAGED`."""
    optimizer = run.method.optimizer(hyperparameters, steps, run.batch_size)

    def step(state: TrainingState, count: jax.Array) -> tuple[TrainingState, jax.Array]:
        params, opt_state = state
        starts = jax.random.randint(jax.random.fold_in(key, count), (run.batch_size, 1), 0, train.size - SEQUENCE)
        text = train[starts + jnp.arange(SEQUENCE + 1)]
        loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(run.network, params, text)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return TrainingState(optax.apply_updates(params, updates), opt_state), loss

    state, losses = jax.lax.scan(step, state, first + jnp.arange(SEGMENT))
    return state, losses.reshape(-1, AVERAGED).mean(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def validate(network: Network, params: nnx.State, validation: jax.Array) -> jax.Array:
    """Returns the mean loss on sequences whose number is a multiple of `EVALUATION_BATCH`."""
    batches = validation.reshape(-1, EVALUATION_BATCH, validation.shape[-1])
    return jax.lax.map(functools.partial(mean_loss, network, params), batches).mean()

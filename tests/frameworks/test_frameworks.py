"""Every framework that trains with AdamW trains with our optimizers, in the same lines, at the same learning rate."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import rootfree_optax as rf

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported, also by pytest.importorskip

Train = Callable[[optax.GradientTransformation], float]

DIGITS = load_digits()
INPUTS, LABELS = jnp.asarray(DIGITS.data / 16, jnp.float32), jnp.asarray(DIGITS.target)
rng = np.random.default_rng(0)
BATCHES = rng.integers(0, len(INPUTS), (100, 64))  # one for each step
# Observations of unit variance around a plane, for Bayesian inference.
POINTS = rng.normal(size=(256, 8)).astype(np.float32)
RESPONSES = (POINTS @ np.linspace(-1, 1, 8) + rng.normal(size=256)).astype(np.float32)

Batch = Any  # indices of digits; everything[:] for the loss that counts
everything = slice(None)


def cross_entropy(apply: Callable[[jax.Array], jax.Array], batch: Batch = everything) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply(INPUTS[batch]), LABELS[batch]).mean()


def train(loss: Callable[..., jax.Array], params: Any, tx: optax.GradientTransformation) -> float:
    """Returns the loss of all digits after the last step, of parameters that are a tree of arrays."""

    @jax.jit
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in BATCHES:
        params, state = step(params, state, batch)
    return float(loss(params))


def nnx(tx: optax.GradientTransformation) -> float:
    from flax import nnx

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Batch) -> None:
        optimizer.update(model, nnx.grad(cross_entropy)(model, batch))

    for batch in BATCHES:
        step(model, optimizer, batch)
    return float(cross_entropy(model))


def linen(tx: optax.GradientTransformation) -> float:
    from flax import linen as nn
    from flax.training.train_state import TrainState

    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), INPUTS), tx=tx)
    loss = lambda params, batch=everything: cross_entropy(lambda x: model.apply(params, x), batch)
    step = jax.jit(lambda state, batch: state.apply_gradients(grads=jax.grad(loss)(state.params, batch)))
    for batch in BATCHES:
        state = step(state, batch)
    return float(loss(state.params))


def equinox(tx: optax.GradientTransformation) -> float:
    import equinox as eqx

    return _train_module(jax.vmap, eqx.nn.MLP(64, 10, 64, 1, key=jax.random.key(0)), tx)


def _train_module(apply: Callable[[Any], Any], model: Any, tx: optax.GradientTransformation) -> float:
    """Trains an Equinox module; `update` is given the whole of it, functions and all."""
    import equinox as eqx

    loss = lambda model, batch=everything: cross_entropy(apply(model), batch)

    @eqx.filter_jit
    def step(model: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        updates, state = tx.update(eqx.filter_grad(loss)(model, batch), state, model)
        return eqx.apply_updates(model, updates), state

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for batch in BATCHES:
        model, state = step(model, state, batch)
    return float(loss(model))


def haliax(tx: optax.GradientTransformation) -> float:
    import haliax as hax

    if not hasattr(jax.core, "is_constant_dim"):
        pytest.skip("this Haliax calls jax.core.is_constant_dim, which this JAX no longer has")
    features, classes = hax.Axis("features", 64), hax.Axis("classes", 10)
    model = hax.nn.MLP.init(features, classes, 64, 1, key=jax.random.key(0))
    apply = lambda model: lambda inputs: model(hax.named(inputs, ("batch", "features"))).array
    return _train_module(apply, model, tx)


def haiku(tx: optax.GradientTransformation) -> float:
    import haiku as hk

    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP((64, 10))(x)))
    params = model.init(jax.random.key(0), INPUTS)
    return train(lambda params, batch=everything: cross_entropy(lambda x: model.apply(params, x), batch), params, tx)


def _keras_model() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((64,)), dense(64, "relu"), dense(10)])


def keras_loop(tx: optax.GradientTransformation) -> float:
    model = _keras_model()
    fixed = [variable.value for variable in model.non_trainable_variables]
    apply = lambda params: lambda x: model.stateless_call(params, fixed, x)[0]
    return train(
        lambda params, batch=everything: cross_entropy(apply(params), batch),
        [variable.value for variable in model.trainable_variables],
        tx,
    )


def keras_fit(tx: optax.GradientTransformation) -> float:
    model = _keras_model()
    import keras

    # In no attribute: Keras takes variables in an optimizer's lists for the optimizer's own, and donates them twice.
    targets, state_variables = [], []

    class Optimizer(keras.optimizers.Optimizer):
        """Keras's optimizer of any Optax transformation."""

        def build(self, variables: Any) -> None:
            super().build(variables)
            targets.extend(variables)
            leaves, self.structure = jax.tree.flatten(tx.init([variable.value for variable in variables]))
            state_variables.extend(
                self.add_variable(
                    leaf.shape, initializer=lambda *_, leaf=leaf, **__: jnp.array(leaf), dtype=leaf.dtype.name
                )
                for leaf in leaves
            )

        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            params = [variable.value for variable in targets]
            state = jax.tree.unflatten(self.structure, [variable.value for variable in state_variables])
            updates, state = tx.update(list(grads), state, params)
            new = [*optax.apply_updates(params, updates), *jax.tree.leaves(state)]
            for variable, value in zip((*targets, *state_variables), new, strict=True):
                variable.assign(value)
            self.iterations.assign_add(1)

    model.compile(Optimizer(learning_rate=1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    in_order = np.asarray(INPUTS)[BATCHES.ravel()], np.asarray(LABELS)[BATCHES.ravel()]
    model.fit(*in_order, batch_size=BATCHES.shape[1], epochs=1, shuffle=False, verbose=0)
    return float(cross_entropy(model))


def numpyro(tx: optax.GradientTransformation) -> float:
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    def model() -> None:
        slopes = numpyro.sample("slopes", dist.Normal(0, 1).expand([8]).to_event(1))
        numpyro.sample("responses", dist.Normal(POINTS @ slopes, 1), obs=RESPONSES)

    svi = SVI(model, AutoNormal(model), tx, Trace_ELBO())
    return float(svi.run(jax.random.key(0), len(BATCHES), progress_bar=False).losses[-10:].mean())


def blackjax(tx: optax.GradientTransformation) -> float:
    import blackjax

    def log_density(slopes: jax.Array) -> jax.Array:
        return -0.5 * jnp.sum((POINTS @ slopes - RESPONSES) ** 2) - 0.5 * jnp.sum(slopes**2)

    algorithm = blackjax.meanfield_vi(log_density, tx, 16)
    state = algorithm.init(jnp.zeros(8))
    step = jax.jit(algorithm.step)
    for i in range(len(BATCHES)):
        state, info = step(jax.random.key(i), state)
    return float(info.elbo)


def flowjax(tx: optax.GradientTransformation) -> float:
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data

    flow = masked_autoregressive_flow(jax.random.key(0), base_dist=Normal(jnp.zeros(2)), flow_layers=2, nn_width=16)
    data = POINTS[:, :2] + 0.3 * POINTS[:, 1::-1] ** 2
    _, losses = fit_to_data(
        jax.random.key(1), flow, data, optimizer=tx, max_epochs=100, max_patience=100, batch_size=230, val_prop=0.1,
        show_progress=False,
    )  # fmt: skip
    return float(losses["train"][-1])


def optimistix(tx: optax.GradientTransformation) -> float:
    import optimistix as optx

    keys = jax.random.split(jax.random.key(0), 2)
    params = [jax.random.normal(key, shape) / 8 for key, shape in zip(keys, ((64, 64), (64, 10)), strict=True)]
    loss = lambda params, _: cross_entropy(lambda x: jax.nn.relu(x @ params[0]) @ params[1])
    solver = optx.OptaxMinimiser(tx, rtol=0.0, atol=0.0)
    solution = optx.minimise(loss, solver, params, max_steps=len(BATCHES), throw=False)
    return float(loss(solution.value, None))


# The package, what trains with it, and the learning rate: AdamW's best of 1e-3, 3e-3, 1e-2, 3e-2 (of 1e-1, too, where
# the loss is an ELBO), chosen before ours were run.
FRAMEWORKS = (
    ("flax", nnx, 3e-2),
    ("flax", linen, 3e-2),
    ("equinox", equinox, 3e-2),
    ("haliax", haliax, 3e-2),
    ("haiku", haiku, 3e-2),
    ("keras", keras_loop, 3e-2),
    ("keras", keras_fit, 3e-2),
    ("numpyro", numpyro, 1e-1),
    ("blackjax", blackjax, 3e-2),
    ("flowjax", flowjax, 3e-2),
    ("optimistix", optimistix, 3e-2),
)
# What a loss may be of AdamW's. One seed is a draw: over 16 seeds of linen's task rf_adamw's ratio is between 0.72 and
# 1.28, 1.02 in the mean; with this seed it is 1.30, and 1.13 in nnx.
WORST_RATIOS = {("rf_adamw", nnx): 1.2, ("rf_adamw", linen): 1.4}


@functools.cache
def loss_of_adamw(run: Train, rate: float) -> float:
    return run(optax.adamw(rate))


@pytest.mark.frameworks
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("default")  # the frameworks' own
@pytest.mark.parametrize("make", [rf.sirf_shampoo, rf.rf_adamw])
@pytest.mark.parametrize(("package", "run", "rate"), FRAMEWORKS, ids=[run.__name__ for _, run, _ in FRAMEWORKS])
def test_it_trains_at_the_learning_rate_of_adamw(package: str, run: Train, rate: float, make: Callable) -> None:
    pytest.importorskip(package)
    loss, expected = run(make(rate)), loss_of_adamw(run, rate)
    assert 0 < loss <= WORST_RATIOS.get((make.__name__, run), 1.1) * expected

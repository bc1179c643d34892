"""A user's block rule, the whole of SOAP: the numbers of NumPy, under every layout, on a mesh, in a scan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, refuses
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from soap import Soap, scale_by_soap

import rootfree_optax as rf

STEPS = 20
SHAPES = {"matrix": (6, 5), "tensor": (2, 3, 4), "vector": (7,), "row": (1, 4), "scalar": ()}
WHOLE, CUT = (rf.Layout(diagonal=None, merge_dims=None, block_size=size) for size in (None, 4))
SETTING = {"b1": 0.9, "b2": 0.8, "damping": 1e-3, "refresh_every": 3}


def soap(learning_rate: float, *, weight_decay: float = 0.1, **setting: Any) -> optax.GradientTransformation:
    """Returns the whole optimizer, of Optax's own links."""
    return optax.chain(
        scale_by_soap(**{**SETTING, **setting}),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def draw(shapes: dict[str, tuple[int, ...]], steps: int = STEPS, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a tree of gradients, with a leading axis of steps; their scale falls as in training."""
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(steps) / 10)
    return {
        name: np.float32(rng.normal(size=(steps, *shape)) * decay.reshape(-1, *[1] * len(shape)))
        for name, shape in shapes.items()
    }


def train(tx: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    """Returns the parameters after every step, in one `jax.lax.scan`, and the last state."""

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), history = jax.lax.scan(step, (params, tx.init(params)), gradients)
    return history, state


def numpy_soap(
    param: np.ndarray,
    gradients: np.ndarray,
    lr: float,
    *,
    b1: float,
    b2: float,
    damping: float,
    refresh_every: int,
    weight_decay: float,
) -> np.ndarray:
    """Returns one parameter after every step, in double precision; of a vector this is AdamW."""
    theta, along = np.float64(param), range(param.ndim if max(param.shape, default=1) < param.size else 0)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    bases: list[np.ndarray] = []
    statistics = [np.zeros((param.shape[axis],) * 2) for axis in along]
    unfold = lambda tensor, axis: np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)

    def turn(tensor: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
        for axis in along:
            tensor = np.moveaxis(np.tensordot(matrices[axis], tensor, (1, axis)), 0, axis)
        return tensor

    history = []
    for t, g in enumerate(np.float64(gradients)):
        outers = [unfold(g, axis) @ unfold(g, axis).T for axis in along]
        bases = bases or [np.linalg.eigh(outer)[1][:, ::-1] for outer in outers]
        statistics = [b2 * old + (1 - b2) * outer for old, outer in zip(statistics, outers, strict=True)]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * turn(g, [q.T for q in bases]) ** 2
        if t % refresh_every == 0:
            for axis in along:
                q, average = bases[axis], statistics[axis]
                order = np.argsort(np.diag(q.T @ average @ q))[::-1]
                v = np.take(v, order, axis)
                bases[axis] = np.linalg.qr(average @ q[:, order])[0]
        adam = turn(m, [q.T for q in bases]) / (1 - b1 ** (t + 1))
        adam /= np.sqrt(v / (1 - b2 ** (t + 1))) + damping
        theta = theta - lr * (turn(adam, bases) + weight_decay * theta)
        history.append(theta)
    return np.stack(history)


def test_twenty_steps_equal_numpy() -> None:
    params = {name: g[0] for name, g in draw(SHAPES, 1, seed=1).items()}
    gradients = draw(SHAPES)
    history, _ = jax.jit(lambda p, g: train(soap(0.05), p, g))(params, gradients)
    for name in SHAPES:
        expected = numpy_soap(params[name], gradients[name], 0.05, weight_decay=0.1, **SETTING)
        np.testing.assert_allclose(history[name], expected, rtol=0, atol=1e-4, err_msg=name)


def test_the_bases_are_orthogonal_and_diagonalise_the_statistics() -> None:
    """Of gradients A·noise, whose statistics have well separated eigenvalues."""
    rng = np.random.default_rng(2)
    mixing = np.linalg.qr(rng.normal(size=(6, 6)))[0] * 2.0 ** -np.arange(6)
    gradients = np.float32(mixing @ rng.normal(size=(100, 6, 50)))
    tx = soap(0.05, b2=0.99, refresh_every=1)
    _, state = jax.jit(lambda g: train(tx, jnp.zeros((6, 50)), g))(gradients)
    [stack] = state[0].stacks
    (q,), _ = ([np.float64(matrix[0]) for matrix in parts] for parts in stack.block.factors)
    (average,), _ = ([np.float64(matrix[0]) for matrix in parts] for parts in stack.block.statistics)
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-5)
    rotated = q.T @ average @ q
    np.testing.assert_allclose(np.sqrt(np.diag(rotated) / rotated[0, 0]), 2.0 ** -np.arange(6), rtol=0.2)
    correlation = rotated / np.sqrt(np.outer(np.diag(rotated), np.diag(rotated)))
    np.testing.assert_allclose(correlation, np.eye(6), atol=0.05)


@pytest.mark.contract
def test_blocks_are_preconditioned_as_parameters_of_their_own() -> None:
    whole = draw({"matrix": (8, 8), "uneven": (4, 6)})
    pieces = {f"matrix{i}{j}": np.s_[:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)}
    pieces |= {f"uneven{j}": np.s_[:, :, j : j + 3] for j in (0, 3)}
    cut = {name: whole[name.rstrip("034")][piece] for name, piece in pieces.items()}
    of_layout = lambda layout: jax.jit(lambda g: train(soap(0.05, layout=layout), first(g), g)[0])
    blocked, alone = of_layout(CUT)(whole), of_layout(WHOLE)(cut)
    for name, piece in pieces.items():
        np.testing.assert_allclose(blocked[name.rstrip("034")][piece], alone[name], rtol=0, atol=1e-5, err_msg=name)


def first(gradients: Any) -> Any:
    return jax.tree.map(lambda g: g[0], gradients)


@pytest.mark.contract
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_divided_over_a_mesh_equals_whole(kind: AxisType) -> None:
    """Eight blocks of 4×4 and four of 3×4 on eight devices."""
    gradients = draw({"up": (4, 16), "down": (16, 4), "odd": (6, 8), "bias": (16,)})
    layout = CUT
    expected, state = jax.jit(lambda g: train(soap(0.05, layout=layout), first(g), g))(gradients)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tx = soap(0.05, layout=layout, mesh_axes="data")
    specs = {"up": (None, None, "data"), "down": (None, "data"), "odd": (None, None, "data"), "bias": (None, "data")}
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(g, NamedSharding(mesh, PartitionSpec(*specs[name]))) for name, g in gradients.items()
        }
        history, divided = jax.jit(lambda g: train(tx, first(g), g))(placed)
    assert_close(jax.device_get(history), jax.device_get(expected))
    for whole, part in zip(state[0].stacks, divided[0].stacks, strict=True):
        assert part.block.nu.shape[0] % 8 == 0
        assert jax.device_get(part.block.is_started).sum() == len(whole.block.is_started)
        if kind is AxisType.Explicit:
            assert jax.typeof(part.block.nu).sharding.spec[0] == "data"


def test_a_block_that_starts_late_starts_as_the_others_did() -> None:
    """After zero gradients, which are no evidence, the first steps are those of a run that begins there."""
    gradients = draw({"matrix": (4, 3)})
    late = {"matrix": np.concatenate([np.zeros((6, 4, 3), np.float32), gradients["matrix"]])}
    tx = soap(0.05, weight_decay=0.0, b1=0.0)
    run = jax.jit(lambda g: train(tx, {"matrix": jnp.ones((4, 3))}, g)[0]["matrix"])
    np.testing.assert_array_equal(run(late)[:6], np.ones((6, 4, 3)))
    np.testing.assert_allclose(run(late)[6:], run(gradients), rtol=0, atol=1e-6)


@pytest.mark.contract
def test_an_interval_of_staggered_refreshes() -> None:
    """Each block as alone, on the steps that are its turn."""
    gradients = draw({"a": (4, 4), "b": (4, 4)})
    run = lambda g, every: jax.jit(lambda g: train(soap(0.05, refresh_every=every), first(g), g)[0])(g)
    in_turn = run(gradients, rf.staggered(2))
    for turn, name in enumerate("ab"):
        due = lambda count, turn=turn: count % 2 == turn
        np.testing.assert_allclose(in_turn[name], run({name: gradients[name]}, due)[name], rtol=0, atol=1e-5)


def test_other_structures_are_refused() -> None:
    tx = rf.scale_by_kronecker(Soap(), layout=rf.Layout(structure="triltoeplitz", diagonal=None, merge_dims=None))
    with refuses(ValueError, "triltoeplitz", "'matrix'", "SOAP needs"):
        tx.init({"matrix": jnp.zeros((4, 3))})

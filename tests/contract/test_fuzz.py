"""Random streams of gradients, and random trees, layouts, options and wrappers, on the scale-free optimizers.

Whatever the gradients, the state stays finite, factors stay definite, other blocks are untouched, and updates stay
within bounds, in units of the learning rate: `RMS` over a block, and √entries times as much for an entry.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import in_contract, shapes_and_dtypes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rootfree_optax as rf
from rootfree_optax._src.structures.names import STRUCTURE_NAMES

# A block's step is 0.4 long in noise and 1 where gradients agree; a diagonal method's is at most Adam's.
RMS = {"kronecker": 1.01, "diagonal": 1.5}
KRONECKER = {"sirf_muon": rf.sirf_muon, "sirf_shampoo": rf.sirf_shampoo, "kl_shampoo": rf.kl_shampoo}
OPTIMIZERS = {**KRONECKER, "rf_adamw": rf.rf_adamw, "rf_rmsprop": rf.rf_rmsprop}
EVENTS = ("silence", "spike", "whisper", "nan", "inf", "rank one", "rows", "one entry", "change", "fade", "largest")


def take_part(event: str, rng: np.random.Generator, stream: np.ndarray, begin: int, end: int) -> None:
    """Changes gradients [steps, …] from one step to another, in place."""
    part, steps = stream[begin:end], np.arange(end - begin).reshape(-1, *[1] * (stream.ndim - 1))
    size = 10.0 ** rng.uniform(5, 20)
    with np.errstate(over="ignore", under="ignore"):
        if event == "silence":
            part[:] = 0
        elif event in ("spike", "whisper"):
            part *= size if event == "spike" else 1 / size
        elif event in ("nan", "inf"):
            flat = part.reshape(len(part), -1)
            flat[:, rng.integers(flat.shape[1])] = np.nan if event == "nan" else -np.inf
        elif event == "rank one":
            part[:] = rng.standard_normal((len(part), *[1] * (stream.ndim - 1))) * part[:1]
        elif event == "rows":
            often = 1 / (1 + np.arange(stream.shape[-1])) ** 1.5
            part *= rng.random((len(part), *[1] * (stream.ndim - 2), stream.shape[-1])) < often
        elif event == "one entry":
            part *= np.arange(part[0].size).reshape(part[0].shape) == rng.integers(part[0].size)
        elif event == "change":
            stream[begin:] *= 10.0 ** rng.uniform(-8, 8)
        elif event == "fade":
            part *= 2.0 ** (-100.0 * steps / len(part))
        elif event == "largest":
            part *= 1e38


def draw_stream(
    seed: int, steps: int, shape: tuple[int, ...], events: list[tuple[str, float, float]], dtype: Any = np.float32
) -> np.ndarray:
    """Returns gradients [steps, *shape] of noise with a mean, in which events happen, in a dtype's range."""
    rng = np.random.default_rng(seed)
    stream = 0.3 + rng.standard_normal((steps, *shape))
    for event, where, length in events:
        begin = int(where * (steps - 1))
        take_part(event, rng, stream, begin, min(steps, begin + 1 + int(length * steps)))
    largest = float(jnp.finfo(dtype).max)
    return np.where(np.isfinite(stream), np.clip(stream, -largest, largest), stream).astype(dtype)


def floats(tree: Any) -> dict[str, np.ndarray]:
    """Returns the floating-point leaves by key path, but for the square of the last direction, which may overflow."""
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {
        path: np.asarray(leaf, np.float64)
        for path, leaf in named.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and "squared_norm" not in path and "largest_gradient" not in path
    }


def assert_bounded(updates: np.ndarray, gradients: np.ndarray, bound: float) -> None:
    """Asserts that updates [steps, …] are finite where gradients are, and within their bound."""
    is_finite = np.isfinite(np.float64(gradients)).reshape(len(gradients), -1).all(1)
    good = np.float64(updates[is_finite]).reshape(is_finite.sum(), -1)
    assert np.isfinite(good).all()
    lengths = np.sqrt(np.mean(np.square(good), axis=1))
    assert lengths.max(initial=0) <= bound
    assert np.abs(good).max(initial=0) <= bound * good.shape[1] ** 0.5


SHAPES = {"changed": (6, 4), "other": (6, 4), "vector": (5,)}
STEPS = 60
STREAMS = {
    "sirf_muon": ({"refresh_every": 3}, jnp.float32),
    "kl_shampoo": ({"refresh_every": rf.staggered(2), "damping": 0.0}, jnp.bfloat16),
    "rf_adamw": ({"damping": 0.0}, jnp.float32),
}


@functools.cache
def compiled(name: str) -> Any:
    options, dtype = STREAMS[name]
    tx = OPTIMIZERS[name](1.0, weight_decay=0.0, **options)
    params = {key: jnp.zeros(shape, dtype) for key, shape in SHAPES.items()}
    step = lambda state, gradient: tx.update(gradient, state, params)[::-1]
    return jax.jit(lambda gradients: jax.lax.scan(step, tx.init(params), gradients))


events = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.floats(0, 1), st.one_of(st.just(0.0), st.floats(0, 0.5))), max_size=4
)


@pytest.mark.parametrize("name", ["sirf_muon", in_contract("kl_shampoo"), "rf_adamw"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 99), happening=events)
def test_a_stream_of_any_gradients_moves_no_other_block_and_keeps_the_state(
    name: str, seed: int, happening: list[tuple[str, float, float]]
) -> None:
    dtype = STREAMS[name][1]
    usual = {key: draw_stream(seed + i, STEPS, shape, [], dtype) for i, (key, shape) in enumerate(SHAPES.items())}
    changed = {**usual, "changed": draw_stream(seed, STEPS, SHAPES["changed"], happening, dtype)}
    _, expected = jax.device_get(compiled(name)(usual))
    state, updates = jax.device_get(compiled(name)(changed))
    for path, leaf in floats(state).items():
        assert np.isfinite(leaf).all(), path
    for key, gradients in changed.items():
        kind = "kronecker" if name in KRONECKER and key != "vector" else "diagonal"
        assert_bounded(updates[key], gradients, RMS[kind])
    np.testing.assert_array_equal(np.float64(updates["vector"]), np.float64(expected["vector"]))
    # Beside a block that is a million times as large another one is noise: its steps are shorter, never others.
    found, plain = (np.float64(tree["other"]).reshape(STEPS, -1) for tree in (updates, expected))
    part = np.sum(found * plain, axis=1) / np.sum(np.square(plain), axis=1)
    assert np.all((part >= 0) & (part <= 1 + 1e-5))
    np.testing.assert_allclose(found, part[:, None] * plain, rtol=0, atol=0.02 * np.abs(plain).max())


# Trees, layouts, options and wrappers.

shapes = st.lists(st.integers(0, 70), max_size=5).filter(lambda shape: np.prod([max(n, 1) for n in shape]) <= 20_000)
leaves = st.one_of(st.none(), st.tuples(shapes.map(tuple), st.sampled_from(["float32", "bfloat16", "float16"])))
trees = st.recursive(leaves, lambda node: st.dictionaries(st.sampled_from("abc"), node, max_size=3), max_leaves=5).map(
    lambda tree: {"root": tree}
)
layouts = st.builds(
    rf.Layout,
    structure=st.sampled_from([None, "dense", "diagonal", "block3diagonal"]),
    max_dense_dim=st.sampled_from([1, 16, 2048]),
    block_size=st.sampled_from([None, 7, 32, 512]),
    merge_dims=st.sampled_from([None, 1, 32, 4096]),
    layer_axes=st.sampled_from([None, lambda path, shape: 0 if len(shape) > 2 else None]),
    diagonal=st.sampled_from([None, rf.EMBEDDINGS, lambda path, shape: len(shape) == 3]),
    factor_dtype=st.sampled_from([None, jnp.float32, jnp.bfloat16, jnp.float16]),
)
of_all = {"mu_dtype": st.sampled_from([None, jnp.float32, jnp.bfloat16]), "weight_decay": st.sampled_from([0.0, None])}
of_matrices = {
    "momentum": st.sampled_from([None, 0.0, 0.9]),
    "nesterov": st.booleans(),
    "statistics_decay": st.sampled_from([0.5, 0.95, 0.999]),
    "damping": st.sampled_from([0.0, 1e-3, 10.0]),
    "refresh_every": st.sampled_from([1, 2, 7, rf.staggered(1), rf.staggered(4), rf.growing(3)]),
    "statistics_every": st.sampled_from([1, 3]),
    "layout": layouts,
}
options = {
    name: st.fixed_dictionaries({}, optional={**of_all, **(of_matrices if name in KRONECKER else {})})
    for name in OPTIMIZERS
}
cases = st.sampled_from(list(OPTIMIZERS)).flatmap(lambda name: st.tuples(st.just(name), options[name]))
WRAPPERS = {
    "none": lambda tx: tx,
    "clip": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "if finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "frozen": optax.set_to_zero()},
        lambda tree: jax.tree.map(lambda leaf: "ours" if leaf.ndim > 1 else "frozen", tree),
    ),
}


def run_any(tree: Any, case: tuple[str, dict[str, Any]], wrapper: str, execute: bool, seed: int) -> None:
    """Traces a step; to be executed are three: an ordinary one, one of non-finite entries, an ordinary one."""
    name, chosen = case
    if chosen.get("momentum", 0.9) is None:
        chosen = {**chosen, "nesterov": False}
    with jax.numpy_dtype_promotion("standard"):
        tx = WRAPPERS[wrapper](OPTIMIZERS[name](1.0, **chosen))
        is_leaf = lambda node: isinstance(node, tuple)
        params = jax.tree.map(lambda leaf: jnp.zeros(*leaf), tree, is_leaf=is_leaf)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert shapes_and_dtypes(after) == shapes_and_dtypes(state)
        assert shapes_and_dtypes(updates) == shapes_and_dtypes(params)
        if not execute:
            return
        rng = np.random.default_rng(seed)
        state, update = tx.init(params), jax.jit(tx.update)
        draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 10.0 ** rng.integers(-4, 4), leaf.dtype)
        for bad in (False, True, False):
            gradients = jax.tree.map(draw, params)
            if bad:
                gradients = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan) if g.size else g, gradients)
            updates, state = update(gradients, state, params)
        for path, leaf in floats(state).items():
            assert np.isfinite(leaf).all(), path
        for leaf in floats(updates).values():
            assert np.isfinite(leaf).all()
            # A parameter of many blocks is as long as one of them; without an average a step is 1/√(1 − b₂) ≤ 5. What
            # is masked away passes as it is.
            is_step = leaf.size and (wrapper != "masked" or leaf.ndim > 1)
            assert np.sqrt(np.mean(np.square(leaf))) <= 5 if is_step else True


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=trees, case=cases, wrapper=st.sampled_from(list(WRAPPERS)))
def test_a_tree_of_any_shapes_has_updates_and_states_of_its_types(tree: Any, case: Any, wrapper: str) -> None:
    run_any(tree, case, wrapper, execute=False, seed=0)


@pytest.mark.fuzz
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(tree=trees, case=cases, wrapper=st.sampled_from(list(WRAPPERS)), seed=st.integers(0, 99))
def test_three_steps_of_a_tree_of_any_shapes(tree: Any, case: Any, wrapper: str, seed: int) -> None:
    run_any(tree, case, wrapper, execute=True, seed=seed)


# Twenty thousand steps.

LONG, CHUNK = 20_000, 1000
DTYPES = ("float32", "bfloat16", "float16")
STRUCTURES = ("dense", "diagonal", "block2diagonal")
PUBLISHED = (*STRUCTURES, "hierarchical1_1", *(s for s in STRUCTURE_NAMES if s.startswith("tri")))
REFRESHES = {"any": None, "staggered": rf.staggered(3), "growing": rf.growing(10)}
INTERVALS = (1, 10, 500)
LENGTH = (4, 3)


def draw_long_streams(begin: int) -> np.ndarray:
    """Returns a part of streams of gradients, [streams, steps, 4, 3]: an event each at one step in 20, or for ever."""
    t = np.arange(begin, begin + CHUNK)[:, None, None]
    rng = np.random.default_rng(begin)
    noise = rng.standard_normal((CHUNK, *LENGTH))
    rare = rng.random((CHUNK, 1, 1)) < 0.05
    first = np.arange(12).reshape(LENGTH) == 0
    rank_one = np.outer([1.0, -2.0, 0.5, 3.0], [0.1, 1.0, -2.0])
    with np.errstate(over="ignore"):
        streams = [
            noise,
            0.3 + noise,
            noise * ((t // 300) % 2 == 0),
            noise * np.where(rare, 1e20, 1),
            noise * np.where(rare, 1e-20, 1),
            np.where(rare & first, np.nan, noise),
            np.where(rare, -np.inf, noise),
            rng.standard_normal((CHUNK, 1, 1)) * rank_one,
            noise * (rng.random((CHUNK, 4, 1)) < np.array([1, 0.3, 0.01, 0.001])[:, None]),
            noise * 10.0 ** (8 * np.sin(1000.0 * (t // 200))),
            noise * np.exp(-t / 250),
            1e-35 * noise * np.exp(t / 250),
            noise * np.where(t % 2 == 0, 1e3, 1e-3),
            noise * (rng.random((CHUNK, *LENGTH)) < 0.01),
            1e-40 * noise,
            1e38 * noise,
            np.ones((CHUNK, *LENGTH)),
            noise * np.outer(10.0 ** -np.arange(4), 10.0 ** (-2.0 * np.arange(3))),
        ]
    return np.stack([np.clip(stream, -3e38, 3e38) if i != 6 else stream for i, stream in enumerate(streams)])


def run_long(tx_of: Any, lanes: Any, params: dict[str, Any], bounds: dict[str, float], steps: int) -> Any:
    """Returns the last states [lanes, streams, …], after checks at every step and of the state after each part."""
    narrow = lambda g, p: jnp.clip(g, -float(jnp.finfo(p.dtype).max), float(jnp.finfo(p.dtype).max)).astype(p.dtype)

    def step(tx: Any, carry: Any, gradient: jax.Array) -> Any:
        state, largest = carry
        is_finite = jnp.all(jnp.isfinite(gradient))
        gradients = {
            k: jnp.where(jnp.isfinite(gradient), narrow(gradient, p), gradient.astype(p.dtype))
            for k, p in params.items()
        }
        updates, state = tx.update(gradients, state, params)
        rms = lambda u: jnp.where(is_finite, jnp.sqrt(jnp.mean(jnp.square(u.astype(jnp.float32)))), 0)
        largest = {k: jnp.fmax(largest[k], jnp.where(jnp.isnan(rms(u)), jnp.inf, rms(u))) for k, u in updates.items()}
        return (state, largest), None

    @jax.jit
    def part(states: Any, gradients: jax.Array) -> Any:
        zeros = dict.fromkeys(params, jnp.zeros([]))
        one = lambda lane, state, g: jax.lax.scan(functools.partial(step, tx_of(lane)), (state, zeros), g)[0]
        return jax.vmap(jax.vmap(one, (None, 0, 0)), (0, 0, None))(lanes, states, gradients)

    count = len(draw_long_streams(0))
    start = jax.vmap(lambda lane: tx_of(lane).init(params))(lanes)
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:, None], (len(lanes), count, *leaf.shape[1:])), start)
    for begin in range(0, steps, CHUNK):
        states, largest = part(states, jnp.asarray(draw_long_streams(begin), jnp.float32))
        for key, found in largest.items():
            assert np.all(np.asarray(found) <= bounds[key]), (begin, key, np.argwhere(np.asarray(found) > bounds[key]))
        for path, leaf in floats(jax.device_get(states)).items():
            assert np.isfinite(leaf).all(), (begin, path, np.argwhere(~np.isfinite(leaf))[:5])
    return jax.device_get(states)


@pytest.mark.fuzz
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("name", KRONECKER)
def test_twenty_thousand_steps_of_every_structure_interval_and_dtype(name: str, refresh: str, dtype: str) -> None:
    params = {s: jnp.zeros(LENGTH, dtype) for s in STRUCTURES}
    layout = rf.Layout(lambda path, shape: path, diagonal=None, merge_dims=None)
    lanes = jnp.asarray(INTERVALS if refresh == "any" else (0,), jnp.int32)
    every = lambda lane: lane if refresh == "any" else REFRESHES[refresh]
    tx_of = lambda lane: KRONECKER[name](1.0, weight_decay=0.0, refresh_every=every(lane), layout=layout)
    states = run_long(tx_of, lanes, params, dict.fromkeys(params, RMS["kronecker"]), LONG)
    for stack in states[0].stacks:
        assert np.all(stack.block.refused == 0)
        for k in jax.tree.leaves(stack.block.factors):
            wide = np.float64(k)
            values = (
                np.abs(wide) if wide.ndim == 4 and wide.shape[-1] in LENGTH else np.linalg.svd(wide, compute_uv=False)
            )
            # ρ = 1e-3, relative to the mean of four eigenvalues, bounds S̃'s condition by 4/ρ, K's by its root.
            assert np.all(values.min(-1) > 0.4 * values.max(-1) * (4e3) ** -0.5)


@pytest.mark.fuzz
@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_thousand_steps_of_every_published_structure(dtype: str) -> None:
    params = {s: jnp.zeros(LENGTH, dtype) for s in PUBLISHED}
    layout = rf.Layout(lambda path, shape: path, diagonal=None, block_size=None, merge_dims=None)
    tx_of = lambda lane: rf.published.sirf_shampoo(
        1.0,
        preconditioner_lr=0.05,
        damping=1e-2,
        riemannian_momentum=0.5,
        batch_size=8,
        refresh_every=lane,
        layout=layout,
    )
    run_long(tx_of, jnp.asarray(INTERVALS, jnp.int32), params, dict.fromkeys(params, np.inf), LONG)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["rf_adamw", "rf_rmsprop", "rest"])
def test_twenty_thousand_steps_of_the_diagonal_methods(name: str) -> None:
    params = {dtype: jnp.zeros(LENGTH, dtype) for dtype in DTYPES}
    make = functools.partial(rf.sirf_muon, layout=rf.Layout(diagonal=".*")) if name == "rest" else OPTIMIZERS[name]
    make = functools.partial(make, 1.0, weight_decay=0.0)
    run_long(
        lambda damping: make() if name == "rest" else make(damping=damping),
        jnp.asarray([0.0, 0.1], jnp.float32),
        params,
        dict.fromkeys(params, RMS["diagonal"]),
        LONG,
    )

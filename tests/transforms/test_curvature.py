"""The three scale-free Kronecker transformations: their metric, their invariances, how blocks are cut and placed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import in_contract
from double_precision import double_precision
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rootfree_optax as rf
from rootfree_optax._src.numerics.polar import orthogonalize


def run(tx, gradients, params=None, state=None):
    """Returns the directions of all steps, stacked, and the last state."""
    if params is None:
        params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), gradients)

    @jax.jit
    def steps(gradients, state):
        def step(state, gradient):
            direction, state = tx.update(gradient, state, params)
            return state, direction

        return jax.lax.scan(step, state, gradients)

    state, directions = steps(gradients, tx.init(params) if state is None else state)
    return jax.device_get(directions), state


def block_of(state):
    """Returns the state of the only block of the only stack."""
    (stack,) = state.stacks
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]).astype(np.promote_types(leaf.dtype, np.float64)), stack.block)


def started(tx, params, statistics, size):
    """Returns the state of one block whose S are given, with K = S^(−1/2), for gradients of mean square `size`."""
    state = tx.init(params)
    (stack,) = state.stacks
    as_parts = lambda matrices: tuple([(jnp.asarray(matrix)[None],) for matrix in matrices])
    block = stack.block._replace(
        statistics=as_parts(statistics),
        factors=as_parts([power(s, -0.5) for s in statistics]),
        power=jnp.full_like(stack.block.power, size),
        seen=jnp.full_like(stack.block.seen, 1e6),  # so that b₂ is the weight from the first gradient on
    )
    return state._replace(stacks=(stack._replace(block=block),))


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def rotation(dim, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def unit(array):
    array = np.asarray(array, np.float64)
    return array / np.sqrt(np.sum(array**2, axis=(-2, -1), keepdims=True))


def kronecker_noise(steps, dims, condition, seed):
    """Returns gradients A Z Bᵀ, Z of independent normal entries, with AAᵀ and BBᵀ of a condition number each."""
    left, right = (rotation(d, seed + i) * np.geomspace(1, condition**-0.5, d) for i, d in enumerate(dims))
    return left @ np.random.default_rng(seed).standard_normal((steps, *dims)) @ right.T


def covariance_eigenvalues(updates):
    flat = updates.reshape(len(updates), -1).astype(np.float64)
    values = np.linalg.eigvalsh(flat.T @ flat / len(flat))
    return values / values.mean()


@pytest.mark.contract
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.research)])
def test_kl_shampoos_updates_are_white_for_kronecker_noise(dtype):
    gradients = jnp.asarray(kronecker_noise(6000, (8, 6), 2e2, seed=3), jnp.float32)
    tx = rf.scale_by_kl_shampoo(None, damping=0.0, layout=rf.Layout(factor_dtype=dtype))
    directions, _ = run(tx, gradients)
    values = covariance_eigenvalues(directions[200:])
    assert 0.5 <= values.min() <= values.max() <= 2, (values.min(), values.max())
    raw = covariance_eigenvalues(np.asarray(gradients))
    assert raw.min() < 1e-3  # what whitening has to undo


@functools.cache
def after_a_change_of_basis(make, condition, dims=(20, 14), **settings):
    """Returns the last direction and state, after the curvature's basis has changed altogether."""
    before, after = (kronecker_noise(60, dims, condition, seed) for seed in (0, 10))
    gradients = jnp.asarray(np.concatenate([before, after]), jnp.float32)
    directions, state = run(make(**settings), gradients)
    return directions[-1], block_of(state), state


@pytest.mark.contract
@pytest.mark.parametrize("interval", [10, pytest.param(1, marks=pytest.mark.research)])
def test_kl_shampoos_direction_is_that_of_the_root_after_a_change_of_basis(interval):
    settings = {"momentum": 0.9, "damping": 0.0, "refresh_every": interval}
    with jax.default_matmul_precision("highest"):
        _, block, state = after_a_change_of_basis(rf.scale_by_kl_shampoo, 1e4, **settings)
        # At a refresh, so that K is of this S.
        last = jnp.asarray(kronecker_noise(1, (20, 14), 1e4, seed=10), jnp.float32)
        direction, state = run(rf.scale_by_kl_shampoo(**settings), last, state=state)
    block = block_of(state)
    momentum = np.asarray(state.stacks[0].momentum[0], np.float64)
    momentum = np.asarray(last[0], np.float64) + 0.9 * momentum  # Nesterov's
    left, right = (parts[0] for parts in block.statistics)
    expected = power(left, -0.5) @ momentum @ power(right, -0.5)
    assert np.linalg.norm(unit(direction[0]) - unit(expected)) <= 0.02
    # With the curvature's inverse, or with nothing, it is another direction altogether.
    assert np.linalg.norm(unit(direction[0]) - unit(momentum)) > 0.5


def test_kl_shampoo_follows_the_recursion_of_online_kl_shampoo():
    """S_a ← β S_a + (1−β)/n·(G P_b)(G P_b)ᵀ, S_b likewise with the P_a before, P = S^(−1/2), U = P_a N P_b."""
    dims, steps, beta = (6, 5), 50, 0.95
    gradients = kronecker_noise(steps, dims, 1e2, seed=1)
    size = np.mean(gradients**2)
    start = [size**0.5 * np.eye(d) for d in dims]
    with double_precision():
        tx = rf.scale_by_kl_shampoo(0.95, beta, damping=0.0, refresh_every=1, precision="highest")
        params = jnp.zeros(dims, jnp.float64)
        directions, state = run(tx, jnp.asarray(gradients), params, started(tx, params, start, size))
        assert int(state.stacks[0].block.exponent[0]) == 0
    momentum, (left, right) = np.zeros(dims), start
    for gradient, direction in zip(gradients, directions, strict=True):
        p_left, p_right = power(left, -0.5), power(right, -0.5)
        a, b = gradient @ p_right, p_left @ gradient
        left = beta * left + (1 - beta) / dims[1] * a @ a.T
        right = beta * right + (1 - beta) / dims[0] * b.T @ b
        momentum = 0.95 * momentum + 0.05 * gradient
        nesterov = 0.95 * momentum + 0.05 * gradient
        expected = power(left, -0.5) @ nesterov @ power(right, -0.5)
        assert np.linalg.norm(unit(direction) - unit(expected)) < 1e-3


@pytest.mark.parametrize(
    ("make", "settings", "is_invariant"),
    [
        (rf.scale_by_sirf_shampoo, {}, True),
        (rf.scale_by_sirf_muon, {"power": 0.5}, True),
        in_contract(rf.scale_by_kl_shampoo, {}, False),
    ],
    ids=["root_free", "spectral", "whitening"],
)
def test_affine_invariance(make, settings, is_invariant):
    """With θ = A₁θ'A₂ᵀ the gradients are A₁ᵀGA₂, and the directions A₁⁻¹DA₂⁻ᵀ."""
    dims, rng = (5, 4), np.random.default_rng(0)
    gradients = rng.standard_normal((20, *dims))
    maps = [np.eye(d) + 0.4 * rng.standard_normal((d, d)) for d in dims]
    size = np.sqrt(np.mean(gradients**2) / np.mean((maps[0].T @ gradients @ maps[1]) ** 2))
    maps = [np.sqrt(size) * a for a in maps]  # so that both gradients have one size
    inverses = [np.linalg.inv(a) for a in maps]
    start = [np.diag(np.linspace(0.5, 1.5, d)) for d in dims]
    with double_precision():
        tx = make(damping=0.0, refresh_every=1, precision="highest", **settings)
        params = jnp.zeros(dims, jnp.float64)
        directions, state = run(tx, jnp.asarray(gradients), params, started(tx, params, start, 1))
        mapped = [a.T @ s @ a for a, s in zip(maps, start, strict=True)]
        others, other = run(tx, jnp.asarray(maps[0].T @ gradients @ maps[1]), params, started(tx, params, mapped, 1))
        assert state.stacks[0].block.exponent == other.stacks[0].block.exponent == 0
    expected = inverses[0] @ np.asarray(directions, np.float64) @ inverses[1].T
    errors = np.linalg.norm(unit(others) - unit(expected), axis=(-2, -1))
    if is_invariant:
        assert errors.max() < 1e-4
    else:
        assert errors.max() > 1e-2


@pytest.mark.parametrize("shape", [(6, 10), in_contract((3, 3, 4, 5))])
def test_newtons_step_has_its_length_at_any_interval_and_damping(shape):
    """Every axis answers a change of the gradients: where all of S is new, or λ's, it overshot by a factor of N − 1."""
    lanes = [(1, 0.0), (10, 0.0), (50, 0.0), (1, 3.0), (10, 100.0), (50, 0.3), (50, 100.0)]
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((220, *shape)), jnp.float32)
    layout = rf.Layout(diagonal=None, merge_dims=None)

    @jax.jit
    @jax.vmap
    def lengths(interval, absolute):
        settings = {"batch_size": 1, "absolute_damping": absolute, "damping": 1e-3, "refresh_every": interval}
        tx = rf.scale_by_sirf_shampoo(None, step_size="newton", nesterov=False, layout=layout, **settings)
        size = lambda g: jnp.sqrt(jnp.mean(jnp.square(g)))

        def step(state, gradient):
            direction, state = tx.update(gradient, state, gradient)
            return state, size(direction) / size(gradient)

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]

    intervals, absolutes = map(jnp.asarray, zip(*lanes, strict=True))
    found = np.asarray(lengths(intervals, absolutes))[:, 100:] * (1 + np.asarray(absolutes))[:, None]
    assert found.min() > 0.75
    assert found.max() < 1.4


@pytest.mark.contract
@pytest.mark.parametrize("power", [pytest.param(0.5, marks=pytest.mark.research), 0.25])
def test_strong_damping_makes_the_spectral_step_muons(power):
    gradients = jnp.asarray(kronecker_noise(12, (7, 5), 1e2, seed=2), jnp.float32)
    tx = rf.scale_by_sirf_muon(0.9, power=power, damping=1e6, nesterov=False, precision="highest")
    with jax.default_matmul_precision("highest"):
        directions, _ = run(tx, gradients)
        momentum = np.zeros((7, 5))
        for gradient, direction in zip(np.asarray(gradients, np.float64), directions, strict=True):
            momentum = 0.9 * momentum + gradient
            expected = orthogonalize(jnp.asarray(unit(momentum), jnp.float32), precision="highest")
            assert np.linalg.norm(unit(direction) - unit(expected)) < 1e-4


def close(actual, expected, tolerance=1e-4):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


PARTS = {0: slice(0, 3), 1: slice(3, None)}


@pytest.mark.parametrize(
    "make", [rf.scale_by_sirf_muon, pytest.param(rf.scale_by_kl_shampoo, marks=pytest.mark.research)]
)
def test_blocks_and_layers_are_parameters_of_their_own(make):
    shapes = {"cut": (6, 6), "layers": (3, 3, 3), "experts": (3, 3, 2)}
    rng = np.random.default_rng(4)
    gradients = {name: jnp.asarray(rng.standard_normal((13, *shape)), jnp.float32) for name, shape in shapes.items()}
    layout = rf.Layout(diagonal=None, block_size=3, layer_axes={"layers": 0, "experts": -1})
    together, _ = run(make(layout=layout), gradients)
    pieces = {
        **{f"cut{i}{j}": (slice(None), rows, columns) for i, rows in PARTS.items() for j, columns in PARTS.items()},
        **{f"layers{i}": (slice(None), i) for i in range(3)},
        **{f"experts{i}": (..., i) for i in range(2)},
    }
    take = lambda tree, name: tree[name.rstrip("0123456789")][pieces[name]]
    apart, _ = run(make(layout=rf.Layout(diagonal=None)), {name: take(gradients, name) for name in pieces})
    for name in pieces:
        close(take(together, name), apart[name])


@pytest.mark.contract
@pytest.mark.parametrize(
    "make", [rf.scale_by_sirf_muon, pytest.param(rf.scale_by_kl_shampoo, marks=pytest.mark.research)]
)
def test_divided_over_eight_devices_it_is_what_it_is_on_one(make):
    shapes = {"up": (8, 8), "odd": (4, 4)}
    rng = np.random.default_rng(5)
    gradients = {name: np.float32(rng.standard_normal((12, *shape))) for name, shape in shapes.items()}
    # Silence and a spike in one block, which its neighbours on other devices must not notice otherwise than on one.
    gradients["odd"][4:7] = 0
    gradients["up"][8] *= 1e4
    layout = rf.Layout(diagonal=None, block_size=4)
    whole, _ = run(make(layout=layout, refresh_every=3), jax.tree.map(jnp.asarray, gradients))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    tx = make(layout=layout, refresh_every=3, mesh_axes="data")
    on_mesh = lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    params = on_mesh(jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), gradients))
    shardings = rf.state_shardings(tx, params)
    state, update = jax.jit(tx.init, out_shardings=shardings)(params), jax.jit(tx.update)
    divided = []
    for gradient in map(on_mesh, [jax.tree.map(lambda g, index=index: g[index], gradients) for index in range(12)]):
        direction, state = update(gradient, state, params)
        divided.append(jax.device_get(direction))
    divided = jax.tree.map(lambda *leaves: np.stack(leaves), *divided)
    close(divided, whole, 2e-4)
    assert max(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.stacks)) == 8


def decades(dtype, make=rf.scale_by_sirf_shampoo, *, damping=0.0, axis=32):
    """Returns a block's state after gradients whose curvature has eight decades, in a rotated basis."""
    rows = np.logspace(-2, 2, axis)[:, None]
    gradients = rotation(axis, 0) @ (rows * np.random.default_rng(1).standard_normal((100, axis, axis)))
    tx = make(None, damping=damping, refresh_every=1, layout=rf.Layout(factor_dtype=dtype))
    return block_of(run(tx, jnp.asarray(gradients, jnp.float32))[1])


def test_factors_hold_over_eight_decades_of_curvature():
    block = decades(jnp.float32)
    (s,), (k,) = block.statistics[0], block.factors[0]
    values = np.linalg.eigvals(k @ k.T @ s).real
    assert 0.9 < values.min() <= values.max() < 1.1


@pytest.mark.contract
@pytest.mark.parametrize("make", [rf.scale_by_sirf_shampoo, rf.scale_by_kl_shampoo], ids=["root_free", "whitening"])
@pytest.mark.parametrize("damping", [0.0, pytest.param(1e-3, marks=pytest.mark.research)])
def test_half_precision_factors_over_eight_decades_are_those_of_their_floor(make, damping):
    block = decades(jnp.bfloat16, make, damping=damping)
    (s,), (k,) = block.statistics[0], block.factors[0]
    floor = max(2.0**-14 * np.linalg.norm(s), damping * np.trace(s) / len(s))
    values = np.linalg.eigvals(k @ k.T @ (s + floor * np.eye(len(s)))).real
    assert 0.7 < values.min() <= values.max() < 1.4
    assert block.refused == 0


@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.research)])
@pytest.mark.parametrize("size", [70.0, *[in_contract(size) for size in (1e5, 1e-6)]])
def test_half_precision_factors_do_not_freeze(dtype, size):
    gradients = jnp.asarray(size * kronecker_noise(30, (6, 5), 30, seed=6), jnp.float32)
    layout = rf.Layout(factor_dtype=dtype)
    tx = rf.scale_by_sirf_shampoo(layout=layout, step_size="newton", batch_size=2**20)
    directions, state = run(tx, gradients)
    block = block_of(state)
    assert block.refused == 0
    single, _ = run(rf.scale_by_sirf_shampoo(step_size="newton", batch_size=2**20), gradients)
    error = np.linalg.norm(directions[-1] - single[-1]) / np.linalg.norm(single[-1])
    assert error < (0.02 if dtype == jnp.float16 else 0.1)


@pytest.mark.research
def test_intervals_say_what_is_taken_in_and_when():
    gradients = jnp.asarray(kronecker_noise(12, (5, 4), 10, seed=7), jnp.float32)
    seen, refreshes = {}, {}
    intervals = {
        "thirds": {"statistics_every": 3, "refresh_every": 4},
        "in turn": {"refresh_every": rf.staggered(3)},
        "growing": {"refresh_every": rf.growing(10)},
    }
    for name, settings in intervals.items():
        _, state = run(rf.scale_by_sirf_shampoo(**settings), gradients)
        seen[name], refreshes[name] = int(block_of(state).seen), int(rf.info(state)["refreshes"])
    # The first gradient counts twice: it is what S starts from, too.
    assert seen == {"thirds": 5, "in turn": 13, "growing": 13}
    assert refreshes == {"thirds": 3, "in turn": 4, "growing": 12}


@pytest.mark.contract
def test_statistics_of_every_third_gradient_are_those_of_their_own_run():
    # Their decay is per step: three steps keep b₂³.
    gradients = jnp.asarray(kronecker_noise(60, (5, 4), 10, seed=8), jnp.float32)
    thirds = rf.scale_by_sirf_shampoo(statistics_every=3, statistics_decay=0.9, refresh_every=3)
    own = rf.scale_by_sirf_shampoo(statistics_decay=0.9**3, refresh_every=1)
    _, state = run(thirds, gradients)
    _, expected = run(own, gradients[::3])
    for name in ("statistics", "factors"):
        close(getattr(block_of(state), name), getattr(block_of(expected), name), 1e-3)


@pytest.mark.parametrize("first", [1e-3, 1.0, 1e3])
def test_an_early_gradient_of_another_size_is_forgotten_within_the_memory(first):
    gradients = kronecker_noise(100, (6, 5), 10, seed=9)
    early = np.concatenate([first * gradients[:1], gradients[1:]])
    both = jnp.asarray(np.stack([gradients, early], axis=1), jnp.float32)
    tx = rf.scale_by_sirf_shampoo(None, layout=rf.Layout(layer_axes=0), refresh_every=1)
    directions, _ = run(tx, both)
    error = np.linalg.norm(directions[:, 0] - directions[:, 1], axis=(-2, -1)) / np.linalg.norm(
        directions[:, 0], axis=(-2, -1)
    )
    assert error[80:].max() < 0.05


def test_power_must_be_one_that_products_make():
    for power in (0.3, 1.0, jnp.float32(0.25)):
        with pytest.raises(ValueError, match="1/2, 1/4 or 1/8"):
            rf.scale_by_sirf_muon(power=power)


@pytest.mark.research
@pytest.mark.parametrize(("start", "end"), [(1e6, 0.0), (0.0, 10.0)])
def test_factors_follow_a_damping_that_changes(start, end):
    gradients = jnp.asarray(kronecker_noise(60, (6, 5), 100, seed=11), jnp.float32)
    damping = lambda count: jnp.where(count < 30, start, end)
    _, state = run(rf.scale_by_sirf_shampoo(damping=damping, refresh_every=5), gradients)
    _, again = run(
        rf.scale_by_sirf_shampoo(damping=end, refresh_every=5), gradients[-1:], state=state._replace(count=jnp.int32(0))
    )
    block = block_of(again)
    for (s,), (k,) in zip(block.statistics, block.factors, strict=True):
        damped = s + end * np.trace(s) / len(s) * np.eye(len(s))
        values = np.linalg.eigvals(k @ k.T @ damped).real
        assert 0.9 < values.min() <= values.max() < 1.1

"""Factors that are refreshed at intervals: the curvature of the gradients in between, and the trust radius."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import refuses
from kronecker_runs import draw, last, params_of, run

import rootfree_optax as rf
from rootfree_optax._src.blocks.apply import shortened

INTERVAL = 4
SETTING = {"preconditioner_lr": 0.3, "damping": 0.1, "batch_size": 4, "update_every": INTERVAL}
SHAPES = {"matrix": (4, 3), "twin": (4, 3), "tensor": (2, 3, 2), "vector": (5,)}
PUBLISHED = {"refresh": "published", "riemannian_momentum": 0.5, "initial_scale": 2.0}
LAYOUT = rf.Layout(structure={1: "diagonal", 2: "dense", 3: ("dense", "hierarchical1_1", "diagonal")})


def with_means_by_hand(gradients, every, **options):
    """Returns the directions and the last state where each refresh is given all gradients that it is the mean of."""
    tx = rf.scale_by_sirf_shampoo(layout=LAYOUT, **SETTING, **options)
    steps = len(jax.tree.leaves(gradients)[0])
    at = lambda step: jax.tree.map(lambda g: jnp.asarray(g[step]), gradients)
    state, directions, update = tx.init(at(0)), [], jax.jit(tx.update)
    for step in range(steps):
        taken = [t for t in range(max(0, step - INTERVAL + 1), step + 1) if t % every == 0]
        curvature = jax.tree.map(lambda g, taken=taken: jnp.asarray(g[np.array(taken)]), gradients)
        due = step % INTERVAL == 0
        direction, state = update(at(step), state, curvature=curvature if due else None)
        directions.append(direction)
    return jax.tree.map(lambda *arrays: np.stack(arrays), *directions), state


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("options", "names"), [({}, ["matrix", "twin", "vector"]), (PUBLISHED, SHAPES)], ids=["exact", "published"]
)
def test_a_refresh_takes_the_mean_over_the_gradients_since_the_last_one(every, options, names):
    gradients = draw({name: SHAPES[name] for name in names}, steps=10)
    tx = rf.scale_by_sirf_shampoo(layout=LAYOUT, curvature_every=every, **SETTING, **options)
    directions, states = run(tx, gradients)
    expected, expected_state = with_means_by_hand(gradients, every, **options)
    chex.assert_trees_all_close(directions, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(last(states).factors, expected_state.factors, rtol=1e-4, atol=1e-5)
    # Another selection of gradients would have made other factors.
    _, alone = run(rf.scale_by_sirf_shampoo(layout=LAYOUT, **SETTING, **options), gradients)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), last(states).factors, last(alone).factors)
    assert min(jax.tree.leaves(difference)) > 1e-3


def test_long_sums_in_half_precision_do_not_stop_growing():
    """Rounded to nearest they would, at 256 times what is added: a quarter of these."""
    gradients = jax.tree.map(np.sign, draw({"a": (6, 5)}, steps=1001))
    setting = {**SETTING, "update_every": 1000, "curvature_every": 1, "damping": 1e-6, "initial_scale": 1.0}
    norms = []
    for dtype in ("float32", "bfloat16"):
        directions, _ = run(rf.scale_by_sirf_shampoo(preconditioner_dtype=dtype, **setting), gradients)
        norms.append(np.linalg.norm(last(directions)["a"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.03)


def test_blocks_that_are_refreshed_in_turn_each_take_the_gradients_since_their_own():
    gradients = draw({"a": (4, 3, 3)}, steps=9)
    options = {**SETTING, "layout": rf.Layout(layer_axes=0), "initial_scale": 1.0}
    tx = rf.scale_by_sirf_shampoo(staggered=True, curvature_every=1, **options)
    _, states = run(tx, gradients)
    sums, numbers = last(states).observed[0]  # the ninth step refreshed the first block
    np.testing.assert_array_equal(numbers, [0, 3, 2, 1])
    for block, since in enumerate([9, 6, 7, 8]):  # each block's sums are those of a run that begins after its refresh
        factors = jax.tree.map(lambda part, at=since - 1, block=block: part[at, block], states.factors[0])
        alone = [np.zeros((3, 3)), np.zeros((3, 3))]
        for gradient in np.float64(gradients["a"][since:, block]):
            x = 2 * factors[0][0].T @ gradient @ factors[1][0]
            alone = [alone[0] + x @ x.T / 3, alone[1] + x.T @ x / 3]
        for (found,), expected in zip(jax.tree.map(lambda part, block=block: part[block], sums), alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_none_of_them():
    gradients = draw(SHAPES, steps=5)
    bad = {**gradients, "twin": gradients["twin"].copy()}
    bad["twin"][2, 0, 0] = np.nan
    tx = rf.scale_by_sirf_shampoo(layout=LAYOUT, curvature_every=1, **SETTING)
    plan = LAYOUT.plan(params_of(gradients))
    (_, good_states), (_, states) = run(tx, gradients), run(tx, bad)
    good, found = (plan.factors(last(history)) for history in (good_states, states))
    without = {"twin": np.delete(gradients["twin"], 2, axis=0)}
    expected = rf.scale_by_sirf_shampoo(layout=LAYOUT, curvature_every=1, **{**SETTING, "update_every": 3})
    _, expected_states = run(expected, without)
    chex.assert_trees_all_close(
        found.pop("twin"), LAYOUT.plan(params_of(without)).factors(last(expected_states))["twin"], rtol=1e-5
    )
    chex.assert_trees_all_equal(found, {name: good[name] for name in found})


def test_a_block_that_has_observed_nothing_stays_as_it_was():
    gradients = draw({"w": (3, 2)}, steps=5)
    gradients["w"][1:] = np.inf
    tx = rf.scale_by_sirf_shampoo(curvature_every=1, cache_products=True, **SETTING)
    _, states = run(tx, gradients)
    for history in jax.tree.leaves((states.factors, states.products)):
        np.testing.assert_array_equal(history[0], history[-1])


def test_half_precision_sums_are_close_to_single_precision_even_of_spikes():
    """The step stays at least −I/2 up to what rounding a sum does, so that K stays positive definite."""
    gradients = draw({"w": (6, 5)}, steps=60)
    gradients["w"][::7] *= 1e2
    run_in = lambda dtype: run(
        rf.scale_by_sirf_shampoo(curvature_every=1, preconditioner_dtype=dtype, **SETTING), gradients
    )
    (expected, _), (found, states) = run_in("float32"), run_in("bfloat16")
    error = np.linalg.norm(found["w"] - expected["w"], axis=(1, 2)) / np.linalg.norm(expected["w"], axis=(1, 2))
    assert error.max() < 0.1, error
    for factor in rf.Layout().plan(params_of(gradients)).factors(last(states))["w"]:
        assert np.linalg.slogdet(np.float64(factor))[0] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sums_are_of_the_factors_dtype(dtype):
    tx = rf.scale_by_sirf_shampoo(curvature_every=1, preconditioner_dtype=dtype, **SETTING)
    state = jax.eval_shape(tx.init, {"w": jnp.zeros((3, 2))})
    (sums, number), *_ = state.observed
    assert [leaf.dtype for leaf in jax.tree.leaves(sums)] == [jnp.dtype(dtype)] * 2
    assert number.dtype == jnp.int32


def test_an_interval_below_one_and_a_radius_of_zero_are_refused():
    with refuses(ValueError, "curvature_every", "at least 1", "0"):
        rf.scale_by_sirf_shampoo(curvature_every=0)
    with refuses(ValueError, "trust_radius", "positive", "0"):
        rf.scale_by_sirf_shampoo(trust_radius=0.0)


def shorten(direction, gradient, radius):
    shortened_now = jax.jit(lambda d, g, r: shortened(d, g, trust_radius=r, batch_size=3.0))
    return np.asarray(shortened_now(np.float32(direction), np.float32(gradient), np.float32(radius)))


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_a_direction_is_shortened_to_the_trust_radius(size):
    """Lengths up to 10³⁰, whose squares float32 does not hold."""
    rng = np.random.default_rng(0)
    gradient = size * rng.standard_normal((4, 3))
    direction = 2 * gradient  # a curvature of a half
    length = np.sqrt(3 * np.mean(gradient * direction))
    np.testing.assert_allclose(shorten(direction, gradient, 0.5 * length), 0.5 * direction, rtol=1e-5)
    np.testing.assert_array_equal(shorten(direction, gradient, 1.01 * length), np.float32(direction))


def test_directions_without_a_length_stay_as_they_are():
    rng = np.random.default_rng(0)
    gradient = np.float32(rng.standard_normal((4, 3)))
    np.testing.assert_array_equal(shorten(np.zeros((4, 3)), gradient, 0.1), np.zeros((4, 3)))
    for value in (np.nan, np.inf, -np.inf):
        bad = gradient.copy()
        bad[1, 2] = value
        np.testing.assert_array_equal(shorten(bad, bad, 0.1), bad)


def test_a_gradient_that_the_factors_did_not_expect_moves_no_further_than_the_radius():
    gradients = draw({"w": (3, 2), "other": (3, 2)}, steps=4)
    gradients["w"][2] *= 1e4  # between two refreshes
    length = lambda d, g: np.sqrt(4 * np.mean(np.float64(d) * g, axis=(1, 2)))
    free, _ = run(rf.scale_by_sirf_shampoo(**SETTING), gradients)
    bound, _ = run(rf.scale_by_sirf_shampoo(trust_radius=5.0, **SETTING), gradients)
    unexpected = length(free["w"], gradients["w"])[2]
    assert unexpected > 1e3
    np.testing.assert_allclose(bound["w"][2], free["w"][2] * 5 / unexpected, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(bound["w"], 2, axis=0), np.delete(free["w"], 2, axis=0))
    np.testing.assert_array_equal(bound["other"], free["other"])


@pytest.mark.parametrize("with_inverses", [False, True])
def test_samples_of_curvature_may_lack_a_parameter_that_has_no_gradient(with_inverses):
    make = rf.scale_by_rf_shampoo if with_inverses else rf.scale_by_sirf_shampoo
    tx = make(batch_size=4)
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones(3)}
    samples = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    directions, _ = tx.update({**params, "b": None}, tx.init(params), params, curvature=samples)
    expected, _ = tx.update(params, tx.init(params), params, curvature=samples)
    assert directions["b"] is None
    chex.assert_trees_all_close(directions["a"], expected["a"], rtol=1e-5)


def test_the_trust_radius_has_a_derivative_where_a_gradient_is_zero():
    length = lambda radius, gradient: jnp.sum(shortened(gradient, gradient, trust_radius=radius, batch_size=4))
    assert jax.grad(length)(0.5, jnp.zeros(3)) == 0
    np.testing.assert_allclose(jax.grad(length)(0.5, jnp.full(3, 2.0)), 6 / 4)  # of three twos, four long

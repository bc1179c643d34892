"""The exact refresh of SIRF-Shampoo, S ← (1 − β₂)·S + β₂·H whatever the width and the gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from kronecker_runs import EXACT_SETTING as SETTING
from kronecker_runs import (
    compile_run,
    dense_factors,
    draw,
    last,
    params_of,
    quick_jit,
    run,
    scale_by_exact,
    scale_by_published,
)
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.blocks.rule import Step
from rootfree_optax._src.blocks.sirf import ExactRefresh, PublishedRefresh, take_clipped_step, take_exact_step
from rootfree_optax._src.structures import structure_factory

BETA = SETTING["weight"]
RF_SETTING = {"preconditioner_lr": BETA, "damping": SETTING["damping"], "batch_size": SETTING["batch_size"]}


def inverse_of_squares(factors):
    """Returns S = (K Kᵀ)⁻¹ of each factor."""
    return {name: [np.linalg.inv(np.float64(k) @ np.float64(k).T) for k in ks] for name, ks in factors.items()}


SHAPES = {"matrix": (6, 5), "tensor": (3, 4, 2)}
STRUCTURE = {2: ("dense", "dense"), 3: ("dense", "diagonal", "dense")}


@functools.cache
def run_with_inverses():
    """Returns the directions and the last factors of RF-Shampoo, in a hundred steps."""
    gradients, layout = draw(SHAPES, steps=100), whole(structure=STRUCTURE)
    directions, states = run(rf.published.scale_by_rf_shampoo(layout=layout, **RF_SETTING), gradients)
    return directions, dense_factors(last(states), params_of(gradients), layout)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 0.05)])
def test_agrees_with_the_method_with_inverses_after_a_hundred_refreshes(dtype, tolerance):
    gradients, layout = draw(SHAPES, steps=100), whole(structure=STRUCTURE, factor_dtype=dtype)
    directions, states = run(scale_by_exact(layout=layout), gradients)
    expected_directions, expected = run_with_inverses()
    found = inverse_of_squares(dense_factors(last(states), params_of(gradients), layout))
    for name, matrices in expected.items():
        # c·S₁ and S₂ / c precondition alike; `balance` may choose c.
        for s, other in zip(found[name], matrices, strict=True):
            np.testing.assert_allclose(s / np.trace(s), other / np.trace(other), atol=tolerance / len(s))
    for direction, other in zip(jax.tree.leaves(directions), jax.tree.leaves(expected_directions), strict=True):
        assert np.abs(direction - other).max() < tolerance * np.abs(other).max()


def test_vectors_have_the_accumulator_of_rf_rmsprop():
    gradients = draw({"vector": (5,)}, steps=30)
    directions, states = run(scale_by_exact(damping=0.0), gradients)
    diagonal = rf.published.scale_by_rf_rms(decay=1 - BETA, damping=0.0, batch_size=4)
    expected, accumulators = run(diagonal, gradients)
    [[[[part]]]] = [[stack.block.factors for stack in states.stacks]]
    np.testing.assert_allclose(part[:, 0] ** -2.0, accumulators.nu["vector"], rtol=2e-5)
    chex.assert_trees_all_close(directions, expected, rtol=2e-5)


@pytest.mark.parametrize("d", [8, 64, 512])
def test_growth_does_not_depend_on_width(d):
    """Without curvature S decays by 1 − β₂, where the published refresh moves K by about β₂ / √d."""
    structure = structure_factory("dense")(d)
    step = (-0.5 * jnp.eye(d),)
    growth = lambda take: quick_jit(take)((jnp.eye(d),))[0][0, 0] ** 2
    moving = {"step": step, "weight": BETA, "count": jnp.int32(0)}
    exact = growth(lambda k: take_exact_step(structure, k, **moving))
    np.testing.assert_allclose(exact, 1 / (1 - BETA), rtol=1e-5)
    assert growth(lambda k: take_clipped_step(structure, k, **moving)) < 1 + 2.1 * BETA / np.sqrt(d)


def spiked(size, steps=60, at=30, length=None):
    gradients = draw({"w": (6, 8)}, steps=steps)
    gradients["w"][at : None if length is None else at + length] *= size
    return gradients


def curvature_over_estimate(tx, gradients):
    """Returns at each step (B·‖g‖² whitened by S) / (number of entries), one where the estimate is right."""
    directions, _ = run(tx, gradients)
    return 4 * np.mean(gradients["w"] * directions["w"], axis=(1, 2))


@pytest.mark.parametrize("structure", ["dense", ("hierarchical2_1", "diagonal")], ids=str)
def test_recovers_from_gradients_a_million_times_as_large_within_an_averages_length(structure):
    recovered = int(30 + 1 / BETA)
    found = curvature_over_estimate(scale_by_exact(damping=0.0, layout=whole(structure=structure)), spiked(1e6))
    assert np.all(found[recovered:] < 3)
    assert found.max() < 1e8  # of 1e12
    published = scale_by_published(BETA, 0.0, None, batch_size=4)
    assert np.all(curvature_over_estimate(published, spiked(1e6))[30:recovered] > 1e9)


def test_a_single_large_gradient_neither_shows_nor_lasts_as_long_as_with_inverses():
    gradients = spiked(1e6, length=1)

    def sizes(tx, of, gradients):
        directions, states = run(tx, gradients)
        at = lambda step: jax.tree.map(lambda leaf: leaf[step], states)
        factors = [dense_factors(at(step), params_of(gradients))["w"] for step in (29, 59)]
        before, after = (np.prod([np.trace(of(matrix)) for matrix in matrices]) for matrices in factors)
        steps = np.abs(directions["w"]).max(axis=(1, 2))
        assert np.all(np.isfinite(steps))
        return after / before, steps[30] / steps[29]

    lasting, shown = sizes(scale_by_exact(damping=0.0), lambda k: np.linalg.inv(k @ k.T), gradients)
    # In single precision it depends on the release of JAX whether S has a Cholesky factor after the spike.
    with double_precision():
        wide = {"w": np.float64(gradients["w"])}
        lasting_inverse, _ = sizes(rf.published.scale_by_rf_shampoo(BETA, 0.0, batch_size=4), lambda s: s, wide)
    assert shown < 200  # of a million
    assert lasting < 1e-12 * lasting_inverse


WILD = ("dense", "hierarchical2_1")


@functools.cache
def compiled(dtype):
    layout = whole(structure=WILD, factor_dtype=dtype)
    return compile_run(lambda weight: scale_by_exact(weight=weight, damping=1e-4, layout=layout))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.95])
def test_factors_stay_finite_and_positive(beta, dtype):
    """K is a product of positive definite matrices, however wild the gradients: rank one, of any size, or zero."""
    rng = np.random.default_rng(0)
    rank_one = rng.standard_normal((120, 6, 1)) * rng.standard_normal((120, 1, 6))
    sizes = 10.0 ** rng.uniform(-8, 8, (120, 1, 1)) * (rng.uniform(size=(120, 1, 1)) < 0.8)
    directions, states = compiled(dtype)({"w": np.float32(rank_one * sizes)}, beta)
    [stack] = states.stacks
    for name, parts in zip(WILD, stack.block.factors, strict=True):
        to_dense = quick_jit(jax.vmap(structure_factory(name)(6).to_dense))
        signs, logarithms = np.linalg.slogdet(np.float64(to_dense(tuple(part[:, 0] for part in parts))))
        assert np.all(np.isfinite(logarithms))
        assert np.all(signs > 0)
    assert np.all(np.isfinite(directions["w"]))
    assert last(stack.block.refused) == 0


@pytest.mark.parametrize("rule", [PublishedRefresh(), ExactRefresh()])
def test_has_the_fixed_point_of_the_published_refresh(rule):
    """Where KᵀHK = I, neither moves K: for one gradient G = U diag(σ) Vᵀ, at K₁ = U diag(σ^(−1/2))·c and K₂ alike."""
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((4, 4))
    u, sigma, vt = np.linalg.svd(gradient)
    # X = √B·K₁ᵀ G K₂ must have X Xᵀ / 4 = I.
    c = (4 / SETTING["batch_size"]) ** 0.25
    factors = tuple((jnp.float32(k),) for k in (c * u * sigma**-0.5, c * vt.T * sigma**-0.5))
    structures = (structure_factory("dense")(4),) * 2
    state = rule.init(structures, [jnp.float32] * 2)._replace(factors=factors)
    if state.is_calibrated is not None:
        state = state._replace(is_calibrated=jnp.ones([], bool))
    refresh = quick_jit(lambda state, g, step: rule.refresh(state, g, structures=structures, step=step))
    numbers = Step(jnp.int32(0), 0.5, 0.0, batch_size=SETTING["batch_size"])
    chex.assert_trees_all_close(refresh(state, jnp.float32(gradient), numbers).factors, factors, atol=1e-5)
    moved = refresh(state, jnp.float32(1.1 * gradient), numbers).factors
    assert all(np.abs(new - old).max() > 1e-2 for (new,), (old,) in zip(moved, factors, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20], ids=str)
def test_a_refresh_that_is_not_finite_is_refused_and_counted(value):
    """Without evidence there is nothing to refuse: before the start, or of statistics of no gradient."""
    structures = tuple(structure_factory(name)(3) for name in ("dense", "diagonal"))
    gradient = np.ones((3, 3), np.float32)
    bad = np.where(np.eye(3) > 0, np.float32(value), gradient)
    step = Step(jnp.int32(0), 0.1, 0.1, batch_size=4.0)

    @functools.partial(quick_jit, static_argnums=0)
    def refresh(observes, is_calibrated, gradient):
        rule = ExactRefresh(observes=observes)
        state = rule.init(structures, [jnp.float32] * 2)._replace(is_calibrated=is_calibrated)
        state = rule.observe(state, gradient, structures=structures, step=step) if observes else state
        return rule.refresh(state, gradient, structures=structures, step=step)

    identities = tuple(structure.identity(jnp.float32) for structure in structures)
    for observes, is_calibrated, refused in ((False, True, 1), (False, False, 0), (True, True, 0)):
        state = refresh(observes, is_calibrated, bad)
        chex.assert_trees_all_equal(state.factors, identities)
        assert state.refused == refused
    assert refresh(False, True, gradient).refused == 0


STRUCTURES = tuple(structure_factory(name)(d) for name, d in (("dense", 6), ("diagonal", 5)))
OBSERVES = ExactRefresh(observes=True)


@functools.cache
def observed(dtype):
    """Returns a compiled function that observes one gradient after another, and then refreshes."""

    @quick_jit
    def observe_all(state, gradients):
        step = Step(jnp.int32(0), 0.3, 0.1, batch_size=4.0)
        observe = lambda state, g: (OBSERVES.observe(state, g, structures=STRUCTURES, step=step), None)
        observed = jax.lax.scan(observe, state, gradients)[0]
        return observed, OBSERVES.refresh(observed, gradients[0], structures=STRUCTURES, step=step)

    state = OBSERVES.init(STRUCTURES, [jnp.dtype(dtype)] * 2)._replace(is_calibrated=jnp.ones([], bool))
    return functools.partial(observe_all, state)


def test_a_refresh_by_statistics_is_that_by_the_mean_over_their_gradients():
    [gradients] = draw([(6, 5)], steps=4)
    state, refreshed = observed("float32")(gradients)
    assert state.observed == 4
    rule, step = ExactRefresh(), Step(jnp.int32(0), 0.3, 0.1, batch_size=4.0)
    first = rule.init(STRUCTURES, [jnp.float32] * 2)._replace(is_calibrated=jnp.ones([], bool))
    expected = quick_jit(lambda g: rule.refresh(first, g, structures=STRUCTURES, step=step))
    chex.assert_trees_all_close(refreshed.factors, expected(gradients).factors, rtol=1e-5, atol=1e-6)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), refreshed.factors, expected(gradients[:3]).factors)
    assert min(jax.tree.leaves(difference)) > 1e-3
    assert refreshed.observed == 0
    chex.assert_trees_all_equal(refreshed.statistics, jax.tree.map(jnp.zeros_like, refreshed.statistics))


def test_statistics_leave_out_a_gradient_that_is_not_finite():
    [gradients] = draw([(6, 5)], steps=4)
    bad = gradients.copy()
    bad[2, 0, 0] = np.nan
    state, _ = observed("float32")(bad)
    expected, _ = observed("float32")(np.concatenate([gradients[:2], gradients[3:]]))
    assert state.observed == 3
    chex.assert_trees_all_close(state.statistics, expected.statistics, rtol=1e-5, atol=1e-5)


def test_long_sums_in_half_precision_do_not_stop_growing():
    """Rounded to nearest they would, at 256 times what is added: a quarter of these."""
    [gradients] = np.sign(draw([(6, 5)], steps=1000))
    single, half = (observed(dtype)(gradients)[0].statistics for dtype in ("float32", "bfloat16"))
    for (expected,), (found,) in zip(single, half, strict=True):
        assert found.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(found) - expected) < 0.01 * np.linalg.norm(expected)


def test_half_precision_sums_are_close_to_single_precision_even_of_spikes():
    """The step stays at least −I/2 up to what rounding a sum does, so that K stays positive definite."""
    [gradients] = draw([(6, 5)], steps=60)
    gradients[::7] *= 1e2
    (_, expected), (_, found) = (observed(dtype)(gradients) for dtype in ("float32", "bfloat16"))
    for (single,), (half,) in zip(expected.factors, found.factors, strict=True):
        assert np.linalg.norm(np.float32(half) - single) < 0.03 * np.linalg.norm(single)
    assert np.linalg.slogdet(np.float64(found.factors[0][0]))[0] == 1
    assert np.all(np.float32(found.factors[1][0]) > 0)

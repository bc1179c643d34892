"""The exact refresh of SIRF-Shampoo, S ← (1 − β₂)·S + β₂·H whatever the width and the gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import refuses
from kronecker_runs import EXACT_SETTING as SETTING
from kronecker_runs import draw, last, params_of, run, scale_by_exact, scale_by_published

import rootfree_optax as rf

BETA = SETTING["preconditioner_lr"]


def inverse_of_squares(factors):
    """Returns S = (K Kᵀ)⁻¹ of each factor."""
    return {name: [np.linalg.inv(np.float64(k) @ np.float64(k).T) for k in ks] for name, ks in factors.items()}


SHAPES = {"matrix": (6, 5), "tensor": (3, 4, 2), "vector": (7,)}
LAYOUT = rf.Layout(structure={1: "diagonal", 2: ("dense", "dense"), 3: ("dense", "diagonal", "dense")})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 0.05)])
def test_agrees_with_the_method_with_inverses_after_a_hundred_refreshes(dtype, tolerance):
    gradients = draw(SHAPES, steps=100)
    plan = LAYOUT.plan(params_of(gradients))
    directions, states = run(scale_by_exact(layout=LAYOUT, preconditioner_dtype=dtype), gradients)
    expected_directions, expected = run(rf.scale_by_rf_shampoo(layout=LAYOUT, **SETTING), gradients)
    found = inverse_of_squares(plan.factors(last(states)))
    for name, matrices in plan.factors(last(expected)).items():
        # c·S₁ and S₂ / c precondition alike; `balance` may choose c.
        for s, other in zip(found[name], matrices, strict=True):
            np.testing.assert_allclose(s / np.trace(s), other / np.trace(other), atol=tolerance / len(s))
    for direction, other in zip(jax.tree.leaves(directions), jax.tree.leaves(expected_directions), strict=True):
        assert np.abs(direction - other).max() < tolerance * np.abs(other).max()


def test_by_default_it_is_exact_and_averages_from_the_first_gradient_on():
    gradients = draw({"matrix": (4, 3)}, steps=30)
    given = {"refresh": "exact", "initial_scale": "first_gradient", "damping": 2e-4, "riemannian_momentum": None}
    explicit = rf.scale_by_sirf_shampoo(rf.averaging_schedule(0.1, 2), batch_size=4, update_every=2, **given)
    directions, _ = run(rf.scale_by_sirf_shampoo(batch_size=4, update_every=2), gradients)
    expected, _ = run(explicit, gradients)
    chex.assert_trees_all_equal(directions, expected)
    constant, _ = run(rf.scale_by_sirf_shampoo(0.1, batch_size=4, update_every=2), gradients)
    assert np.abs(directions["matrix"][10] / constant["matrix"][10] - 1).max() > 0.1


def test_vectors_have_the_accumulator_of_rf_rmsprop():
    gradients = draw({"vector": (5,)}, steps=30)
    directions, states = run(scale_by_exact(damping=0.0), gradients)
    diagonal = rf.scale_by_rf_rms(decay=1 - BETA, damping=0.0, batch_size=4)
    expected, accumulators = run(diagonal, gradients)
    [[[[part]]]] = [states.factors]
    np.testing.assert_allclose(part[:, 0] ** -2.0, accumulators.nu["vector"], rtol=2e-5)
    chex.assert_trees_all_close(directions, expected, rtol=2e-5)


@pytest.mark.parametrize("d", [8, 64, 1024])
def test_growth_does_not_depend_on_width(d):
    """Without curvature S decays by 1 − β₂, where the published refresh moves K by about β₂ / √d."""
    zeros = {"w": np.zeros((5, d, 2), np.float32)}
    layout = rf.Layout(structure=("dense", "diagonal"))
    growth = lambda tx: float(last(run(tx, zeros)[1]).factors[0][0][0][0, 0, 0]) ** (2 / 5)
    np.testing.assert_allclose(growth(scale_by_exact(damping=0.0, layout=layout)), 1 / (1 - BETA), rtol=1e-5)
    published = scale_by_published(BETA, 0.0, None, batch_size=4, layout=layout)
    assert growth(published) < 1 + 2.1 * BETA / np.sqrt(d)


def spiked(size, steps=60, at=30, length=None):
    gradients = draw({"w": (6, 8)}, steps=steps)
    gradients["w"][at : None if length is None else at + length] *= size
    return gradients


def curvature_over_estimate(tx, gradients):
    """Returns at each step (B·‖g‖² whitened by S) / (number of entries), one where the estimate is right."""
    directions, _ = run(tx, gradients)
    return 4 * np.mean(gradients["w"] * directions["w"], axis=(1, 2))


@pytest.mark.parametrize("structure", ["dense", "hierarchical2_1"])
def test_recovers_from_gradients_a_million_times_as_large_within_an_averages_length(structure):
    recovered = int(30 + 1 / BETA)
    found = curvature_over_estimate(scale_by_exact(damping=0.0, layout=rf.Layout(structure=structure)), spiked(1e6))
    assert np.all(found[recovered:] < 3)
    assert found.max() < 1e8  # of 1e12
    published = scale_by_published(BETA, 0.0, None, batch_size=4)
    assert np.all(curvature_over_estimate(published, spiked(1e6))[30:recovered] > 1e9)


def test_a_single_large_gradient_neither_shows_nor_lasts_as_long_as_with_inverses():
    gradients = spiked(1e6, length=1)
    plan = rf.Layout().plan(params_of(gradients))

    def sizes(tx, of):
        directions, states = run(tx, gradients)
        [factors] = [[plan.factors(jax.tree.map(lambda leaf, t=t: leaf[t], states))["w"] for t in (29, 59)]]
        before, after = (np.prod([np.trace(of(matrix)) for matrix in matrices]) for matrices in factors)
        steps = np.abs(directions["w"]).max(axis=(1, 2))
        assert np.all(np.isfinite(steps))
        return after / before, steps[30] / steps[29]

    lasting, shown = sizes(scale_by_exact(damping=0.0), lambda k: np.linalg.inv(k @ k.T))
    lasting_inverse, _ = sizes(rf.scale_by_rf_shampoo(BETA, 0.0, batch_size=4), lambda s: s)
    assert shown < 200  # of a million
    assert lasting < 1e-12 * lasting_inverse


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("structure", "beta"), [("dense", 0.1), ("dense", 0.95), ("hierarchical2_1", 0.5)])
def test_factors_stay_finite_and_positive(structure, beta, dtype):
    """K is a product of positive definite matrices, however wild the gradients: rank one, of any size, or zero."""
    rng = np.random.default_rng(0)
    rank_one = rng.standard_normal((120, 6, 1)) * rng.standard_normal((120, 1, 6))
    sizes = 10.0 ** rng.uniform(-8, 8, (120, 1, 1)) * (rng.uniform(size=(120, 1, 1)) < 0.8)
    gradients = {"w": np.float32(rank_one * sizes)}
    layout = rf.Layout(structure=structure)
    tx = scale_by_exact(preconditioner_lr=beta, damping=1e-4, preconditioner_dtype=dtype, layout=layout)
    directions, states = run(tx, gradients)
    factors = jax.vmap(layout.plan(params_of(gradients)).factors)(states)["w"]
    for factor in factors:
        signs, logarithms = np.linalg.slogdet(np.float64(factor))
        assert np.all(np.isfinite(logarithms))
        assert np.all(signs > 0)
    assert np.all(np.isfinite(directions["w"]))


def test_has_the_fixed_point_of_the_published_refresh():
    """Where KᵀHK = I, neither moves K: for one gradient G = U diag(σ) Vᵀ, at K₁ = U diag(σ^(−1/2))·c and K₂ alike."""
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((4, 4))
    u, sigma, vt = np.linalg.svd(gradient)
    # X = √B·K₁ᵀ G K₂ must have X Xᵀ / 4 = I.
    c = (4 / SETTING["batch_size"]) ** 0.25
    k1, k2 = c * u * sigma**-0.5, c * vt.T * sigma**-0.5
    factors = (tuple((jnp.asarray(k[None], jnp.float32),) for k in (k1, k2)),)
    for refresh in ("published", "exact"):
        tx = scale_by_exact(refresh=refresh, damping=0.0, preconditioner_lr=0.5)
        params = jnp.zeros((4, 4))
        state = tx.init(params)._replace(factors=factors)
        _, state = tx.update(jnp.asarray(gradient, jnp.float32), state, params)
        chex.assert_trees_all_close(state.factors, factors, atol=1e-5)


def test_what_cannot_be_is_refused():
    with refuses(ValueError, "refresh", "'published', 'exact'", "'sudden'"):
        rf.scale_by_sirf_shampoo(refresh="sudden")
    with refuses(ValueError, "initial_scale", "'first_gradient'", "'second_gradient'"):
        rf.scale_by_sirf_shampoo(initial_scale="second_gradient")
    with refuses(ValueError, "initial_scale", "positive", "0"):
        rf.scale_by_sirf_shampoo(initial_scale=0.0)
    with refuses(ValueError, "preconditioner_lr", "[0, 1)", "1.0"):
        scale_by_exact(preconditioner_lr=1.0)
    for options in (
        {"refresh": "published"},
        {"update_every": rf.growing_interval(10)},
        {"update_every": jnp.bool_(1)},
    ):
        with refuses(ValueError, "preconditioner_lr must be given", "at an interval that is a number has a default"):
            rf.scale_by_sirf_shampoo(**options)
    with refuses(ValueError, "riemannian_momentum", "None or a Python 0", "0.5"):
        rf.scale_by_sirf_shampoo(riemannian_momentum=0.5)
    for structure in ("triltoeplitz", "trilbottomrightdiag"):
        tx = scale_by_exact(layout=rf.Layout(structure=structure))
        with refuses(ValueError, "closed form", f"'{structure}'", "'layer/w'"):
            tx.init({"layer": {"w": jnp.zeros((3, 4))}})
    tx = scale_by_exact(layout=rf.Layout(structure="hierarchical1_1"), cache_products=True)
    with refuses(ValueError, "cache_products", "closed under transposition", "'hierarchical1_1'", "'layer/w'"):
        tx.init({"layer": {"w": jnp.zeros((3, 4))}})

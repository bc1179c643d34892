"""The scale-free curvature rules against NumPy in double precision, and what they do with gradients of other sizes."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import in_contract
from double_precision import double_precision
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_optax._src.blocks.curvature import RootFree, Spectral, Whitening, curvatures_along, scale_gradient
from rootfree_optax._src.blocks.rule import Step
from rootfree_optax._src.numerics.polar import orthogonalize
from rootfree_optax._src.structures.names import dense, diagonal

WEIGHT, DAMPING = 0.2, 0.1
MAKE = {"dense": dense, "diagonal": diagonal}


def step(**changes):
    return Step(jnp.int32(0), **{"weight": WEIGHT, "damping": DAMPING, **changes})


def advance(rule, structures, gradients, *, dtype=jnp.float32, numbers=None):
    """Returns the state after gradients, each of which starts, is observed and refreshes the factors."""
    numbers = step() if numbers is None else numbers
    given = {"structures": structures, "step": numbers}

    def take_in(state, gradient):
        return rule.refresh(rule.observe(state, gradient, **given), gradient, **given), None

    @jax.jit
    def run(gradients):
        state = rule.init(structures, [dtype] * len(structures))
        return jax.lax.scan(take_in, rule.start(state, gradients[0], **given), gradients)[0]

    return run(jnp.stack(gradients))


def compiled(rule, structures, **changes):
    """Returns a rule's functions for some structures and one step's numbers, each as one program."""
    given = {"structures": structures, "step": step(**changes)}
    own = lambda name: jax.jit(lambda *arrays, **others: getattr(rule, name)(*arrays, **given, **others))
    return types.SimpleNamespace(**{name: own(name) for name in ("start", "observe", "refresh", "precondition")})


def as_matrix(parts):
    part = np.asarray(parts[0], np.float64)
    return np.diag(part) if part.ndim == 1 else part


def along(matrix, tensor, axis):
    return np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)


def every_axis(matrices, tensor, but=None):
    for axis, matrix in enumerate(matrices):
        tensor = tensor if axis == but else along(matrix, tensor, axis)
    return tensor


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


class Reference:
    """S and the damped S̃ after gradients in units of 2ᵉ, by inverses in double precision."""

    def __init__(self, shape, kinds, samples):
        self.shape, self.kinds, self.samples = shape, kinds, samples
        self.seen = 0

    def take_in(self, gradient):
        batch = gradient if self.samples else gradient[None]
        if self.seen == 0:
            mean = np.mean(batch**2) ** (1 / len(self.shape))
            self.s = [mean * np.eye(d) for d in self.shape]
            self.damp()
            self.seen = 1
        roots = [power(s, -0.5) for s in self.damped]
        weight = max(WEIGHT, 1 / (self.seen + 1))
        for n, d in enumerate(self.shape):
            h = np.zeros((d, d))
            for g in batch:
                z = np.moveaxis(every_axis(roots, g, but=n), n, 0).reshape(d, -1)
                h += z @ z.T / (math.prod(self.shape) / d) / len(batch)
            h = np.diag(np.diag(h)) if self.kinds[n] == "diagonal" else h
            self.s[n] = (1 - weight) * self.s[n] + weight * h
        self.seen += 1
        self.damp()
        for n, (d, root, damped) in enumerate(zip(self.shape, roots, self.damped, strict=True)):
            # Together the axes answer a change of the gradients once at most.
            self.s[n] *= (np.trace(root @ damped @ root) / d) ** (1 / max(len(self.shape) * weight, 1) - 1)
        self.damp()

    def damp(self):
        self.damped = [s + DAMPING * np.trace(s) / len(s) * np.eye(len(s)) for s in self.s]


axes_of_blocks = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["dense", "diagonal"])), min_size=1, max_size=4)


@pytest.mark.research
@settings(max_examples=20, deadline=None, derandomize=True)
@given(axes=axes_of_blocks, samples=st.sampled_from([0, 3]), seed=st.integers(0, 99))
def test_statistics_factors_and_newtons_step_of_any_block_are_numpys(axes, samples, seed):
    check_against_numpy(axes, samples, seed)


@pytest.mark.parametrize(
    ("axes", "samples"),
    [
        in_contract([(4, "dense"), (3, "dense")], 0),
        ([(2, "dense"), (1, "dense"), (3, "diagonal"), (2, "dense")], 3),
    ],
)
def test_statistics_factors_and_newtons_step_are_numpys(axes, samples):
    check_against_numpy(axes, samples, seed=5)


def check_against_numpy(axes, samples, seed):
    shape, kinds = zip(*axes, strict=True)
    rng = np.random.default_rng(seed)
    # Of one size, so that no gradient is a surprise.
    gradients = [np.sign(g) * (0.5 + abs(g)) / 3 for g in rng.standard_normal((3, *[samples] * bool(samples), *shape))]
    structures = [MAKE[kind](d) for d, kind in axes]
    with double_precision():
        radius = 1.5
        rule = RootFree(step_size="newton", trust_radius=radius, precision="highest")
        numbers = step(batch_size=7.0, absolute_damping=0.0)
        state = advance(rule, structures, [jnp.asarray(g) for g in gradients], dtype=jnp.float64, numbers=numbers)
        momentum = rng.standard_normal(shape)
        take = compiled(rule, structures, batch_size=7.0, absolute_damping=0.0).precondition
        direction, after = take(state, jnp.asarray(momentum), gradient=jnp.asarray(momentum))
    direction, unit = np.asarray(direction), 2.0 ** int(state.exponent)
    reference = Reference(shape, kinds, samples)
    for gradient in gradients:
        reference.take_in(gradient / unit)
    for found, s, damped, k in zip(state.statistics, reference.s, reference.damped, state.factors, strict=True):
        np.testing.assert_allclose(as_matrix(found), s, rtol=0, atol=2e-5 * np.abs(s).max())
        k = as_matrix(k)
        np.testing.assert_allclose(k @ k.T @ damped, np.eye(len(s)), rtol=0, atol=1e-4)
    newton = every_axis([np.linalg.inv(s) for s in reference.damped], momentum) / (7 * unit**2)
    length = np.mean(momentum * newton) * 7  # (L/√B)²·B, in the metric of B·S
    expected = newton * min(1, radius**2 / length)
    np.testing.assert_allclose(direction, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert int(after.shortened) == int(length > radius**2)


POWERS = {
    RootFree(): 1.0,
    Whitening(): 0.5,
    Spectral(0.5): 0.5,
    Spectral(0.25): 0.25,
    Spectral(0.125): 0.125,
}


@pytest.mark.parametrize(
    "rule",
    [in_contract(rule) if rule == Spectral(0.125) else rule for rule in POWERS],
    ids=lambda rule: f"{type(rule).__name__}{getattr(rule, 'power', '')}",
)
def test_a_direction_is_the_momentum_times_powers_of_the_curvature(rule):
    shape, rng = (5, 4), np.random.default_rng(0)
    structures = [dense(d) for d in shape]
    a, b = rng.standard_normal((5, 5)), rng.standard_normal((4, 4))
    gradients = [a @ g @ b for g in rng.standard_normal((12, *shape))]
    momentum = rng.standard_normal(shape)
    with double_precision():
        state = advance(rule, structures, [jnp.asarray(g) for g in gradients], dtype=jnp.float64)
        take = compiled(rule, structures).precondition
        direction, _ = take(state, jnp.asarray(momentum), gradient=jnp.asarray(momentum))
        direction, exponent = np.asarray(direction), POWERS[rule]
        s = [as_matrix(parts) for parts in state.statistics]
        powers = [power(x + DAMPING * np.trace(x) / len(x) * np.eye(len(x)), -exponent) for x in s]
        expected = every_axis(powers, momentum)
        if isinstance(rule, Spectral):
            expected = every_axis(powers, np.asarray(orthogonalize(jnp.asarray(expected))))
    np.testing.assert_allclose(np.sqrt(np.mean(direction**2)), rule.rms, rtol=1e-6)
    expected *= rule.rms / np.sqrt(np.mean(expected**2))
    assert np.linalg.norm(direction - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("rule", POWERS, ids=lambda rule: f"{type(rule).__name__}{getattr(rule, 'power', '')}")
def test_float16_factors_turn_a_momentum_beyond_their_range_as_one_within(rule):
    """As after a gradient a million times as large as those that follow: it is divided by what they are."""
    structures = [dense(3), diagonal(2)]
    gradient, momentum = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 2)), jnp.float32)
    start = rule.init(structures, [jnp.float16] * 2)
    state = compiled(rule, structures).start(start, gradient)
    turn = jax.jit(lambda m: rule.precondition_momentum(state, m, structures))
    within, beyond = (turn(size * momentum) for size in (1.0, 2.0**40))
    unit = lambda direction: direction / jnp.linalg.norm(direction)
    np.testing.assert_allclose(unit(beyond), unit(within), rtol=0, atol=2e-3)


@pytest.mark.parametrize("exponent", [1 / 4, 1 / 8])
def test_powers_of_the_curvature_are_accurate_over_four_decades(exponent):
    rng = np.random.default_rng(2)
    vectors, rotation = (np.linalg.qr(rng.standard_normal((24, 24)))[0] for _ in range(2))
    s = (vectors * np.geomspace(1e3, 1e-1, 24)) @ vectors.T
    k = power(s, -0.5) @ rotation
    given = [(jnp.asarray(matrix, jnp.float32),) for matrix in (k, s)]
    kept, found = jax.jit(lambda *args: Spectral(exponent).derive_factor(*args, dense(24)))(*given)
    np.testing.assert_array_equal(kept[0], given[0][0])
    # Relative to every eigenvalue, not to the largest alone.
    relative = power(s, exponent / 2) @ as_matrix(found) @ power(s, exponent / 2)
    np.testing.assert_allclose(relative, np.eye(24), rtol=0, atol=3e-3)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_the_absolute_damping_is_the_papers(size):
    # λ·Π_{j≠n} tr(S̃ⱼ⁻¹)/dⱼ is added to S̃ₙ, in the units of B·S.
    shape, rng = (3, 2), np.random.default_rng(1)
    structures = [dense(3), dense(2)]
    gradient = size * rng.standard_normal(shape)
    with double_precision():
        rule = RootFree(step_size="newton", precision="highest")
        own = compiled(rule, structures, damping=0.0, absolute_damping=0.6 * size**2, batch_size=2.0)
        before = own.start(rule.init(structures, [jnp.float64] * 2), jnp.asarray(gradient))
        after = own.refresh(before, jnp.asarray(gradient))
    damping = 0.3 * size**2 / 4.0 ** int(before.exponent)
    for n, structure in enumerate(structures):
        other = np.asarray(before.factors[1 - n][0])
        mean_inverse = np.trace(other @ other.T) / len(other)
        damped = np.asarray(before.statistics[n][0]) + damping * mean_inverse * np.eye(structure.dim)
        k = np.asarray(after.factors[n][0])
        np.testing.assert_allclose(k @ k.T @ damped, np.eye(structure.dim), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_damping_a_gradient_of_rank_one_leaves_what_the_dtype_resolves(dtype):
    rule, structure = RootFree(), [dense(4), dense(3)]
    gradient = jnp.zeros((4, 3)).at[0, 0].set(1.0)
    state = advance(rule, structure, [gradient] * 400, dtype=dtype, numbers=step(damping=0.0))
    assert int(state.refused) == 0
    part = 2.0**-14 if dtype == jnp.bfloat16 else 2.0**-23 / 8
    for s, k in zip(state.statistics, state.factors, strict=True):
        s, k = as_matrix(s), as_matrix(jax.tree.map(lambda part: part.astype(jnp.float32), k))
        np.testing.assert_allclose((k @ k.T)[1, 1], 1 / (part * np.linalg.norm(s)), rtol=0.05)


def test_a_refresh_that_is_not_finite_for_one_axis_is_refused_for_all():
    rule, structures = RootFree(), [dense(3), dense(2)]
    gradients = [jnp.asarray(g, jnp.float32) for g in np.random.default_rng(0).standard_normal((2, 3, 2))]
    state = advance(rule, structures, gradients)
    twice = jax.tree.map(lambda s: 2 * s, state.statistics[0])  # so that the finite axis has a new factor
    bad = state._replace(statistics=(twice, jax.tree.map(lambda s: s * jnp.nan, state.statistics[1])))
    after = compiled(rule, structures).refresh(bad, gradients[0])
    assert int(after.refused) == int(state.refused) + 1
    for old, new in zip(jax.tree.leaves(bad.factors), jax.tree.leaves(after.factors), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_entries_that_the_first_gradient_does_not_touch_do_not_count(rows):
    rule, structures = RootFree(), [dense(4), dense(3)]
    gradient = jnp.zeros((4, 3)).at[:rows].set(0.75)
    start = rule.init(structures, [jnp.float32] * 2)
    state = compiled(rule, structures).start(start, gradient)
    first, second = [float(s[0][0, 0]) for s in state.statistics]
    np.testing.assert_allclose(first * second * 4.0 ** int(state.exponent), 0.75**2, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 0.3, 1.0, 5e3, 1e20, 3e37])
def test_a_gradient_of_another_size_changes_the_scale_at_once(size):
    gradient = size * jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)
    scaled = scale_gradient(gradient, jnp.int32(0), jnp.float32(1), largest_rise=2, largest_fall=2)
    assert bool(scaled.is_evidence)
    exact = np.asarray(gradient, np.float64) / 2.0 ** int(scaled.exponent)
    np.testing.assert_array_equal(scaled.gradient, exact.astype(np.float32))
    np.testing.assert_allclose(scaled.power, np.mean(exact**2), rtol=1e-5)
    assert abs(np.log2(float(scaled.power)) / 2) <= 2.6
    if 0.25 < size < 4:
        assert int(scaled.exponent) == 0


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_what_is_no_evidence_leaves_the_curvature_bit_for_bit(bad):
    structures = [dense(3), diagonal(2)]
    rng = np.random.default_rng(0)
    first = [jnp.asarray(g, jnp.float32) for g in rng.standard_normal((2, 3, 2))]
    last = jnp.zeros((3, 2)) if bad == 0 else first[0].at[1, 1].set(bad)
    rule = RootFree()
    before = advance(rule, structures, first)
    after = compiled(rule, structures).observe(before, last)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("power", [2.0**40, 2.0**-40])
def test_units_far_from_the_gradients_come_nearer_and_nothing_else_changes(power):
    """Half the way at each step: S, mean(x²) and the momentum are the same numbers in other units."""
    structures = [dense(3), diagonal(2)]
    rng = np.random.default_rng(0)
    before = advance(RootFree(), structures, [jnp.asarray(g, jnp.float32) for g in rng.standard_normal((2, 3, 2))])
    before = before._replace(power=jnp.float32(power), last_momentum=jnp.float32(3))
    after = compiled(RootFree(), structures).observe(before, jnp.zeros((3, 2)))
    assert int(after.exponent - before.exponent) == np.log2(power) / 2
    for degree, names in ((4.0, ("statistics", "power")), (2.0, ("last_momentum",))):
        in_units = lambda state, names=names, degree=degree: [
            leaf * degree ** float(state.exponent) for name in names for leaf in jax.tree.leaves(getattr(state, name))
        ]
        for old, new in zip(in_units(before), in_units(after), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-6)


def test_an_untouched_row_of_a_diagonal_axis_keeps_its_curvature():
    structures = [diagonal(4), dense(3)]
    rng = np.random.default_rng(0)
    draws = jnp.asarray(rng.standard_normal((6, 4, 3)), jnp.float32)
    before = advance(RootFree(), structures, list(draws[:3]))
    rows, observe = jnp.asarray([1.0, 0.0, 1.0, 1.0])[:, None], compiled(RootFree(), structures).observe
    after = before
    for gradient in draws[3:]:
        after = observe(after, gradient * rows)
    old, new = before.statistics[0][0], after.statistics[0][0]
    assert old[1] == new[1]
    assert np.all(old[jnp.asarray([0, 2, 3])] != new[jnp.asarray([0, 2, 3])])


@pytest.mark.contract
def test_one_refresh_follows_rows_whose_curvature_fades():
    """K may grow there as far as S has forgotten since the last refresh."""
    shape, rng, rule, structures = (6, 6), np.random.default_rng(0), RootFree(), [dense(6), dense(6)]
    state = advance(rule, structures, list(jnp.asarray(rng.standard_normal((30, *shape)), jnp.float32)))
    fading = rng.standard_normal((10, *shape))
    fading[:, :3] = 0
    own = compiled(rule, structures, damping=1e-3)
    for gradient in fading:
        state = own.observe(state, jnp.asarray(gradient, jnp.float32))
    np.testing.assert_allclose(state.retained, (1 - WEIGHT) ** 10, rtol=1e-5)
    after = own.refresh(state, state.statistics[0][0])
    assert after.retained == 1
    s, k = as_matrix(after.statistics[0]), as_matrix(after.factors[0])
    damped = s + 1e-3 * np.trace(s) / 6 * np.eye(6)
    np.testing.assert_allclose(k.T @ damped @ k, np.eye(6), rtol=0, atol=2e-3)


@pytest.mark.contract
@pytest.mark.parametrize("observations", [40, 4000])
def test_factors_are_renewed_however_little_is_left_of_their_curvature(observations):
    # S forgets all of the S of the last refresh, so what it has lost is no bound on how much K may grow.
    shape, rng = (6, 6), np.random.default_rng(0)
    structures = [dense(6), dense(6)]
    scales = jnp.asarray(np.geomspace(0.3, 3, 6)[:, None], jnp.float32)
    first = jnp.asarray(rng.standard_normal((8, *shape)), jnp.float32)
    rule = RootFree()
    state = advance(rule, structures, list(first))
    observe = lambda state, key: (
        rule.observe(state, scales * jax.random.normal(key, shape), structures=structures, step=step()),
        None,
    )

    @jax.jit
    def round_of(state, key):
        state, _ = jax.lax.scan(observe, state, jax.random.split(key, observations))
        return rule.refresh(state, first[0], structures=structures, step=step())

    for index in range(3):
        state = round_of(state, jax.random.key(index))
    for s, k in zip(state.statistics, state.factors, strict=True):
        s, k = np.asarray(s[0], np.float64), np.asarray(k[0], np.float64)
        damped = s + DAMPING * np.trace(s) / 6 * np.eye(6)
        values = np.linalg.eigvals(k @ k.T @ damped).real
        assert 0.9 < values.min() <= values.max() < 1.1
    assert int(state.refused) == 0


@pytest.mark.contract
def test_two_refreshes_follow_a_curvature_that_has_grown_by_any_factor():
    """Gradients of rank one and random amplitude do that between refreshes that are 500 steps apart.

    K grew in directions in which it was to shrink, and was further off at each refresh, until it overflowed.
    """
    rule, structures, given = RootFree(), [dense(3), dense(5)], {"step": step()}
    given["structures"] = structures
    state = rule.start(rule.init(structures, [jnp.float32] * 2), jnp.ones((3, 5)), **given)
    spectra = [np.diag(np.float32(1e8 * np.geomspace(0.1, 1, s.dim))) for s in structures]
    state = state._replace(statistics=tuple((jnp.asarray(s),) for s in spectra), retained=jnp.float32(1e-12))
    worst = []
    for _ in range(2):
        state = rule.refresh(state, jnp.ones((3, 5)), **given)
        values = [
            k.T @ (s + DAMPING * np.trace(s) / len(s) * np.eye(len(s))) @ k
            for s, k in zip(map(as_matrix, state.statistics), map(as_matrix, state.factors), strict=True)
        ]
        worst.append(max(np.abs(np.log(np.linalg.eigvalsh(v))).max() for v in values))
    assert worst[0] < np.log(4)
    assert worst[1] < 1e-3


def test_gradients_of_random_amplitude_stay_in_the_range_of_float16():
    """Each small one left 2ᵉ smaller, so that x, and S with it, overflowed before the next refresh."""
    rule, given = RootFree(), {"structures": [dense(4), dense(3)], "step": step(weight=0.05)}
    pattern = np.outer([1.0, -2.0, 0.5, 3.0], [0.1, 1.0, -2.0])
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((2000, 1, 1)) * pattern, jnp.float16)

    @jax.jit
    def run(gradients):
        take_in = lambda state, g: (state := rule.observe(state, g, **given), state.power)
        state = rule.start(rule.init(given["structures"], [jnp.float16] * 2), gradients[0], **given)
        return jax.lax.scan(take_in, state, gradients)

    state, power = run(gradients)
    assert np.all(np.abs(np.log2(power)) <= 17)
    size = 2.0 ** float(rule.scale(state)) / np.sqrt(np.mean(np.square(pattern)))
    assert 0.2 < size < 5
    for parts in state.statistics:
        values = np.linalg.eigvalsh(as_matrix(parts))
        assert np.isfinite(values).all()
        assert abs(values[:-1]).max() < 1e-3 * values[-1]


def lengths_after(change, *, steps, momentum=0.95):
    """Returns the lengths of updates after `change` of a block's gradients, and of their sum, in full lengths."""
    structures, shape = [dense(8), dense(8)], (8, 8)
    rule, rng = RootFree(), np.random.default_rng(0)
    noise = jnp.asarray(0.5 + rng.standard_normal((40 + steps, *shape)), jnp.float32)
    gradients = noise.at[40:].multiply(jnp.float32(change))

    @jax.jit
    def run(gradients):
        given = {"structures": structures, "step": step(weight=0.05, newest=0.05)}
        state = rule.start(rule.init(structures, [jnp.float32] * 2), gradients[0], **given)

        def one(carry, gradient):
            state, average = carry
            average = momentum * average + (1 - momentum) * gradient
            state = rule.refresh(rule.observe(state, gradient, **given), gradient, **given)
            direction, state = rule.precondition(state, average, gradient=gradient, **given)
            return (state, average), direction

        return jax.lax.scan(one, (state, jnp.zeros(shape)), gradients)[1]

    directions = np.asarray(run(gradients), np.float64)
    rms = lambda array: np.sqrt(np.mean(array**2, axis=(-2, -1)))
    assert (rms(directions)[1:40] > 0.999 * rule.rms).all()
    after = directions[40:] / rule.rms
    return rms(after), rms(after.sum(0))


@pytest.mark.parametrize(
    ("period", "least", "most"),
    [(None, 1.0, 1.0), (1, 0.4, 0.42), (2, 0.4, 0.4), (12, 0.4, 0.41), (200, 0.9, 1.0)],
    ids=["constant", "noise", "alternating", "swinging", "drifting"],
)
def test_a_step_is_as_long_as_adamws_while_gradients_agree(period, least, most):
    shape, structures, rule = (40, 30), [dense(40), dense(30)], RootFree()
    rng, count, weight = np.random.default_rng(1), np.arange(120), 0.05
    gradients = np.broadcast_to(rng.standard_normal(shape), (120, *shape))
    if period == 1:
        gradients = rng.standard_normal((120, *shape))
    elif period:
        gradients = np.cos(2 * np.pi * count / period)[:, None, None] * gradients
    gradients = jnp.asarray(gradients, jnp.float32)
    given = {"structures": structures, "step": step(newest=weight)}
    state = compiled(rule, structures).start(rule.init(structures, [jnp.float32] * 2), gradients[0])

    def one(carry, gradient):
        state, average = carry
        average = (1 - weight) * average + weight * gradient
        direction, state = rule.precondition(state, average, gradient=gradient, **given)
        return (state, average), direction

    _, directions = jax.jit(lambda g: jax.lax.scan(one, (state, g[0]), g[1:]))(gradients)
    lengths = np.sqrt(np.mean(np.asarray(directions, np.float64) ** 2, (1, 2)))[-20:]
    assert least - 1e-5 <= lengths.mean() <= most + 1e-5


def test_a_silent_block_stops_as_its_momentum_does():
    lengths, moved = lengths_after(0.0, steps=200)
    np.testing.assert_allclose(lengths, 0.95 ** np.arange(1, 201), rtol=1e-3)
    assert moved <= 19 * 1.001


@pytest.mark.parametrize("change", [1e-2, 1e-4, 1e-6])
def test_a_block_whose_gradients_fall_is_not_marched_along_its_old_momentum(change):
    lengths, _ = lengths_after(change, steps=100)
    momentum_beside_gradients = 0.45 / change * 0.95 ** np.arange(1, 101)
    while_old = lengths[momentum_beside_gradients > 10]
    assert while_old.sum() < 1 / (1 - 0.95)
    assert while_old[0] < 100 * change


def test_a_block_of_rounding_noise_beside_the_tree_shrinks_in_proportion():
    structures = [dense(3), dense(2)]
    gradient = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)), jnp.float32)
    rule = RootFree()
    state = advance(rule, structures, [gradient])

    @jax.jit
    def take(excess):
        numbers = step(largest_scale=rule.scale(state) + excess)
        return rule.precondition(state, gradient, gradient=gradient, structures=structures, step=numbers)[0]

    for excess in (0.0, 18.0, 24.0):
        direction = take(excess)
        expected = rule.rms * min(1, 2.0**-excess / 1e-6)
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(direction))), expected, rtol=1e-5)


@pytest.mark.parametrize("rule", [Spectral(0.5), Spectral(0.25), Spectral(0.125)])
def test_before_the_first_refresh_a_step_is_as_long_as_after_it(rule):
    structures, shape = [dense(4), dense(3)], (4, 3)
    gradient = 1e-3 * jnp.ones(shape).at[1:].set(0)  # entries touched are far from a root mean square of one
    own = compiled(rule, structures)
    state = own.start(rule.init(structures, [jnp.float32] * 2), gradient)
    after = own.refresh(state, gradient)
    for found, expected in zip(
        jax.tree.leaves(state.preconditioners), jax.tree.leaves(after.preconditioners), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    factors = state.factors if rule.power == 0.5 else state.preconditioners
    damped = (np.asarray(state.statistics[0][0])[0, 0] * (1 + DAMPING)) ** -rule.power
    np.testing.assert_allclose(factors[0][0], damped * np.eye(4), rtol=1e-5)


def test_float16_factors_take_in_gradients_whose_products_they_do_not_hold():
    gradient = np.float32(1e3 * np.random.default_rng(0).standard_normal((4, 3)))
    factors = [((200 * np.eye(d)).astype(np.float16),) for d in gradient.shape]
    found = curvatures_along(jnp.asarray(gradient), [dense(4), dense(3)], jax.tree.map(jnp.asarray, factors))
    for part, expected in zip(found, (gradient @ gradient.T / 3, gradient.T @ gradient / 4), strict=True):
        np.testing.assert_allclose(part[0], 4e4 * expected, rtol=0, atol=2e-3 * 4e4 * np.abs(expected).max())


def test_units_are_the_gradients_however_the_axes_share_the_curvature():
    """c·S₁ and S₂/c act alike. Where three axes shrank and one grew, mean(x²) ran away, and S with it, to infinity."""
    rule, structures = RootFree(), [dense(d) for d in (3, 3, 4, 4)]
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 3, 4, 4)), jnp.float32)
    given = {"structures": structures, "step": step()}

    def go_on(state):
        take_in = lambda state, g: (rule.refresh(rule.observe(state, g, **given), g, **given), None)
        state, _ = jax.lax.scan(take_in, state, gradients)
        return state, rule.precondition(state, gradients[0], gradient=gradients[0], **given)[0]

    def share(state, shares):
        scale = lambda matrices, degree: tuple(
            [tuple([part * 2.0 ** (degree * c) for part in parts]) for parts, c in zip(matrices, shares, strict=True)]
        )
        return state._replace(statistics=scale(state.statistics, 2), factors=scale(state.factors, -1))

    state, go_on = advance(rule, structures, gradients), jax.jit(go_on)
    _, expected = go_on(state)
    for shares in ((-3, -3, -3, 9), (3, 3, -3, -3), (9, -3, -3, -3), (2, 2, -2, -2), (-12, 4, 4, 4)):
        after, direction = go_on(share(state, shares))
        assert 2**-4 < after.power < 2**4, shares
        np.testing.assert_allclose(direction, expected, rtol=0, atol=1e-5)


def long_streams(shape):
    """Returns the names of streams that move S or its scale, and their gradients [streams, steps, *shape]."""
    rng = np.random.default_rng(0)
    steps, noise = np.arange(2000), rng.standard_normal((2000, *shape))
    along_steps = (-1, *[1] * len(shape))
    sizes = {
        "fading": 2.0 ** (-steps / 20),
        "growing": 2.0 ** (steps / 20 - 100),
        "spikes": np.where(rng.random(2000) < 0.1, 1e18, 1.0),
        "rare spikes, downward": np.where(steps % 7 == 0, 1e-18, 1.0),
    }
    streams = {name: size.reshape(along_steps) * noise for name, size in sizes.items()}
    vectors = [rng.standard_normal(length) for length in shape]
    rank_one = rng.standard_normal(2000).reshape(along_steps) * functools.reduce(np.multiply.outer, vectors)
    return [*streams, "rank one"], np.float32(np.stack([*streams.values(), rank_one]))


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((3, 5), jnp.float32, 1e-3),
        in_contract((3, 5), jnp.float16, 0.05),
        in_contract((3, 2, 2, 5), jnp.float32, 1e-3),
    ],
)
def test_nothing_drifts_in_thousands_of_refreshes(shape, dtype, tolerance):
    """c·S₁ and S₂/c act alike, and so do 2ᵉ and a factor of S; a rank of one pushes the two S apart at every step."""
    rule, structures = RootFree(), [dense(d) for d in shape]
    given = {"structures": structures, "step": step(weight=0.05)}

    @jax.jit
    @jax.vmap
    def run(gradients):
        take_in = lambda state, g: (rule.refresh(rule.observe(state, g, **given), g, **given), None)
        state = rule.start(rule.init(structures, [dtype] * len(shape)), gradients[0], **given)
        return jax.lax.scan(take_in, state, gradients)[0]

    names, gradients = long_streams(shape)
    states = jax.device_get(run(jnp.asarray(gradients)))
    for index, name in enumerate(names):
        state = jax.tree.map(lambda leaf, index=index: leaf[index], states)
        assert state.refused == 0, name
        assert 2**-4 <= state.power <= 2**4, name
        for parts, factor in zip(state.statistics, state.factors, strict=True):
            s, k = as_matrix(parts), as_matrix(factor)
            mean = np.trace(s) / len(s)
            assert 2**-8 <= mean <= 2**8, name
            error = k.T @ (s + DAMPING * mean * np.eye(len(s))) @ k - np.eye(len(s))
            assert np.abs(error).max() < tolerance, (name, error)

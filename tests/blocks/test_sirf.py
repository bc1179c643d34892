"""The inverse-free refresh and direction of one block, against dense float64 NumPy written from the equations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision

from rootfree_optax._src.blocks.apply import apply_factors
from rootfree_optax._src.blocks.rule import Step
from rootfree_optax._src.blocks.sirf import PublishedRefresh, balance, factor_steps, outer_products
from rootfree_optax._src.numerics.arithmetic import max_abs
from rootfree_optax._src.structures.names import structure_factory

# Shape, structures, and the number of samples of the curvature (0: it is the gradient).
CASES = {
    "vector_dense": ((6,), ("dense",), 0),
    "vector_diagonal": ((6,), ("diagonal",), 3),
    "matrix_dense": ((4, 6), ("dense", "dense"), 0),
    "matrix_dense_diagonal": ((4, 6), ("dense", "diagonal"), 3),
    "matrix_structured": ((5, 4), ("triutoeplitz", "trilbottomrightdiag"), 2),
    "three_axes": ((3, 4, 5), ("dense", "diagonal", "dense"), 0),
    "four_axes": ((2, 3, 4, 3), ("dense", "diagonal", "dense", "diagonal"), 2),
}


def along(matrix, tensor, axis):
    return np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)


def gram(tensor, axis):
    unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    return unfolded @ unfolded.T


def project(name, s):
    """Returns Π̂(S): an entry with its mirror image outside the structure counts twice, a diagonal is averaged."""
    d = len(s)
    i, j = np.indices((d, d))
    if "toeplitz" in name:
        offset = i - j if name.startswith("tril") else j - i
        means = [np.trace(s, k) * (1 if k == 0 else 2) / (d - k) for k in range(d)]
        return np.where(offset >= 0, np.take(means, np.maximum(offset, 0)), 0.0)
    inside = {"dense": i == i, "diagonal": i == j, "trilbottomrightdiag": (i == j) | (j == 0)}[name]
    return inside * s * np.where(inside & inside.T, 1, 2)


def numpy_refresh(samples, ks, ms, names, *, weight, damping, riemannian_momentum, batch_size):
    """Returns the new K, the new m, and the norms that the clip looked at; `samples` [n, …] are averaged over."""
    xs = [np.sqrt(batch_size) * g for g in samples]
    for axis, k in enumerate(ks):
        xs = [along(k.T, x, axis) for x in xs]
    dims = [len(k) for k in ks]
    new_ks, new_ms = [], []
    for n, (k, m, name) in enumerate(zip(ks, ms, names, strict=True)):
        others = [j for j in range(len(ks)) if j != n]
        traces = np.prod([np.trace(ks[j].T @ ks[j]) for j in others])
        curvature = np.mean([gram(x, n) for x in xs], axis=0) + damping * traces * k.T @ k
        step = project(name, curvature) / (2 * np.prod([dims[j] for j in others])) - np.eye(dims[n]) / 2
        m = riemannian_momentum * m + (1 - riemannian_momentum) * step
        new_ms.append(m)
        new_ks.append(k - weight / max(1, np.linalg.norm(m)) * k @ m)
    return new_ks, new_ms, [np.linalg.norm(m) for m in new_ms]


def numpy_direction(gradient, ks):
    for axis, k in enumerate(ks):
        gradient = along(k @ k.T, gradient, axis)
    return gradient


def structures_of(names, shape):
    return tuple(structure_factory(name)(d) for name, d in zip(names, shape, strict=True))


def dense(structures, parts):
    return [s.to_dense(p) for s, p in zip(structures, parts, strict=True)]


def random_parts(rng, structures, scale, *, identity):
    """Returns matrices of each structure, of random numbers, or those around the identity: no K is symmetric."""
    parts_of = lambda s: s.identity(np.float32) if identity else s.zeros(np.float32)
    draw = lambda part: np.asarray(part, np.float64) + scale * rng.standard_normal(part.shape)
    return tuple(tuple(map(draw, parts_of(s))) for s in structures)


SETTING = {"weight": 0.3, "damping": 0.05, "riemannian_momentum": 0.7, "batch_size": 8.0}
# The last number is the size of the gradient: with 0.05 no factor's step is clipped, with 2 every one is.
SETTINGS = [
    (SETTING, 0.05),
    (SETTING, 2.0),
    (SETTING | {"damping": 0.0, "batch_size": 1.0}, 0.05),
    (SETTING | {"damping": 3.0, "riemannian_momentum": 0.2, "weight": 0.02}, 2.0),
]


def published(structures, riemannian_momentum, dtype):
    """Returns the rule, and the state that it starts with."""
    rule = PublishedRefresh(riemannian_momentum)
    return rule, rule.init(structures, [dtype] * len(structures))


def float64_step(structures):
    """Returns a compiled refresh and application, from the parts to dense matrices."""

    @jax.jit
    def step(curvature, gradient, factors, momenta, riemannian_momentum, **numbers):
        rule, state = published(structures, None if momenta is None else riemannian_momentum, jnp.float64)
        given = {"structures": structures, "step": Step(jnp.int32(0), **numbers)}
        new = rule.refresh(state._replace(factors=factors, momenta=momenta), curvature, **given)
        direction, _ = rule.precondition(new, gradient, gradient=gradient, **given)
        each = (factors, momenta, new.factors, new.momenta)
        return [[] if parts is None else dense(structures, parts) for parts in each], direction

    return step


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_numpy(case):
    shape, names, samples = CASES[case]
    with double_precision():
        structures = structures_of(names, shape)
        step = float64_step(structures)
        for seed, (setting, scale) in enumerate(SETTINGS):
            rng = np.random.default_rng(seed)
            factors = random_parts(rng, structures, 0.3, identity=True)
            momenta = random_parts(rng, structures, 0.05, identity=False)
            gradient = scale * rng.standard_normal(shape)
            curvature = scale * rng.standard_normal((samples, *shape)) if samples else gradient
            (ks, ms, *found), direction = jax.device_get(step(curvature, gradient, factors, momenta, **setting))

            each = curvature if samples else [gradient]
            new_ks, new_ms, norms = numpy_refresh(each, ks, ms, names, **setting)
            assert min(norms) > 1 if scale > 1 else max(norms) < 1
            chex.assert_trees_all_close(found, [new_ks, new_ms], rtol=1e-11, atol=1e-11)
            np.testing.assert_allclose(direction, numpy_direction(gradient, new_ks), rtol=1e-11, atol=1e-11)


def test_without_momentum_the_step_is_taken_as_it_is():
    shape, names, _ = CASES["matrix_structured"]
    with double_precision():
        structures = structures_of(names, shape)
        rng = np.random.default_rng(0)
        factors = random_parts(rng, structures, 0.3, identity=True)
        gradient = rng.standard_normal(shape)
        # Whatever α₂ is: there is nothing for it to keep.
        (ks, _, new, none), _ = jax.device_get(float64_step(structures)(gradient, gradient, factors, None, **SETTING))
        zeros = [np.zeros_like(k) for k in ks]
        expected, _, _ = numpy_refresh([gradient], ks, zeros, names, **SETTING | {"riemannian_momentum": 0.0})
        assert none == []
        chex.assert_trees_all_close(new, expected, rtol=1e-11)


HALF = jnp.float16  # the narrowest range: 65504


def dense_pair(k, dtype):
    return tuple((jnp.asarray(k, dtype),) for _ in range(2))


@pytest.mark.parametrize("names", [("dense", "dense"), ("diagonal", "diagonal")], ids="-".join)
def test_long_axes_do_not_leave_half_precision(names):
    """Kᵀ is divided by √d before it meets the gradient: of ones, d = 64, along both axes, that is 64 instead of d²."""
    d, value = 64, 20.0
    structures = structures_of(names, (d, d))
    shapes = [structure.part_shapes[0] for structure in structures]
    gradient = jnp.full((d, d), 1.0 if names[0] == "dense" else 100.0)

    @jax.jit
    def steps(dtype_of):
        factors = tuple((jnp.full(shape, value, dtype_of.dtype),) for shape in shapes)
        outers = outer_products(gradient, structures, factors, batch_size=1.0)
        return factor_steps(outers, structures, factors, damping=1e-4)

    half, single = steps(jnp.zeros(0, HALF)), steps(jnp.zeros(0))
    chex.assert_trees_all_close(half, single, rtol=4 * float(jnp.finfo(HALF).eps))


@jax.jit
def half_precision_direction(gradient, k):
    structures = structures_of(("dense", "dense"), gradient.shape)
    return apply_factors(gradient, dense_pair(k, HALF), structures=structures, transposed_first=True)


@pytest.mark.parametrize("k", [1e3, 1e-3])
def test_large_factors_do_not_leave_half_precision(k):
    """K Kᵀ is 10⁶ and K Kᵀ along both axes 10¹², both beyond the range of the factors' dtype; so is 10⁻¹²."""
    gradient = np.float32(0.25) * np.ones((3, 3), np.float32)
    direction = half_precision_direction(gradient, k * np.eye(3))
    np.testing.assert_allclose(
        direction, gradient * np.float64(np.float16(k)) ** 4, rtol=4 * float(jnp.finfo(HALF).eps)
    )


@pytest.mark.parametrize("size", [1e-20, 1e5, 1e20])
def test_the_gradient_may_exceed_the_factors_range(size):
    gradient = np.float32(size) * np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    direction = half_precision_direction(gradient, np.eye(3))
    np.testing.assert_allclose(direction, gradient, rtol=4 * float(jnp.finfo(HALF).eps))


@pytest.mark.parametrize("size", [1e6, 1e10, 1e15])
def test_a_huge_gradient_shrinks_the_factors_as_far_as_the_clip_allows(size):
    """The square of its step's norm is beyond float32's range at 10¹⁰ already; the step itself only at 10¹⁹."""
    names = ("dense", "diagonal")
    structures = structures_of(names, (3, 4))
    rng = np.random.default_rng(0)
    factors = random_parts(rng, structures, 0.3, identity=True)
    gradient = size * rng.standard_normal((3, 4))
    setting = {"weight": 0.5, "damping": 0.01, "batch_size": 1.0}
    new = refresh_matrix(*jax.tree.map(np.float32, (gradient, factors)), None, **setting).factors
    ks = [np.float64(k) for k in dense(structures, jax.tree.map(jnp.float32, factors))]
    zeros = [np.zeros_like(k) for k in ks]
    expected, _, _ = numpy_refresh([gradient], ks, zeros, names, riemannian_momentum=0.0, **setting)
    chex.assert_trees_all_close(dense(structures, new), [np.float32(k) for k in expected], rtol=1e-5, atol=1e-6)


def test_the_refresh_has_a_fixed_point_where_the_curvature_is_the_identity():
    """Where KᵀHK = I, K stays: for one gradient G = U diag(σ) Vᵀ, at K₁ = U diag(σ^(−1/2))·c and K₂ alike."""
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((4, 4))
    u, sigma, vt = np.linalg.svd(gradient)
    # X = √B·K₁ᵀ G K₂ must have X Xᵀ / 4 = I, for B = 4.
    factors = tuple((jnp.float32(k),) for k in (u * sigma**-0.5, vt.T * sigma**-0.5))
    structures = structures_of(("dense", "dense"), (4, 4))
    rule, state = published(structures, None, jnp.float32)
    state, step = state._replace(factors=factors), Step(jnp.int32(0), 0.5, 0.0, batch_size=4.0)
    refresh = jax.jit(lambda g: rule.refresh(state, g, structures=structures, step=step).factors)
    chex.assert_trees_all_close(refresh(jnp.float32(gradient)), factors, atol=1e-5)
    moved = refresh(jnp.float32(1.1 * gradient))
    assert all(np.abs(new - old).max() > 1e-2 for (new,), (old,) in zip(moved, factors, strict=True))


@jax.jit
def refresh_matrix(gradient, factors, momenta, **numbers):
    structures = structures_of(("dense", "diagonal"), (3, 4))
    rule, state = published(structures, None if momenta is None else 0.5, jnp.float32)
    state = state._replace(factors=factors, momenta=momenta)
    return rule.refresh(state, gradient, structures=structures, step=Step(jnp.int32(0), **numbers))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20], ids=str)
def test_a_refresh_that_is_not_finite_is_refused_and_counted(value):
    structures = structures_of(("dense", "diagonal"), (3, 4))
    rng = np.random.default_rng(0)
    factors, momenta = (
        jax.tree.map(jnp.float32, random_parts(rng, structures, 0.2, identity=identity)) for identity in (True, False)
    )
    setting = {"weight": 0.5, "damping": 0.1, "batch_size": 2.0}
    gradient = np.ones((3, 4), np.float32)
    gradient[1, 2] = value
    refused = refresh_matrix(gradient, factors, momenta, **setting)
    chex.assert_trees_all_equal((refused.factors, refused.momenta), (factors, momenta))
    assert refused.refused == 1
    moved = refresh_matrix(np.ones((3, 4), np.float32), factors, momenta, **setting)
    assert moved.refused == 0
    assert all(np.abs(new - old).max() > 1e-2 for (new,), (old,) in zip(moved.factors, factors, strict=True))


@pytest.mark.parametrize("exponents", [(40, -3), (-100, 5), (3, 0, -15), (-20, 0, 20), (60,)], ids=str)
def test_factors_are_balanced_by_powers_of_two_whose_product_is_one(exponents):
    rng = np.random.default_rng(0)
    factors = tuple((np.float32(2.0**e * rng.uniform(1, 2, (3, 3))),) for e in exponents)
    balanced = balance(factors, [max_abs(parts) for parts in factors])
    scales = [np.unique(np.asarray(new) / old) for (new,), (old,) in zip(balanced, factors, strict=True)]
    assert all(len(scale) == 1 and np.log2(scale[0]) % 1 == 0 for scale in scales)
    assert np.prod(np.concatenate(scales)) == 1
    sizes = [np.max(part) for (part,) in balanced]
    assert max(sizes) / min(sizes) < 2**17


@pytest.mark.parametrize("axes", [3, 4, 5, 6])
@pytest.mark.parametrize("exponent", [-40, 40])
def test_a_factor_far_from_all_others_comes_closer_whatever_their_number(axes, exponent):
    """A kernel over space and time has five axes."""
    factors = tuple((jnp.full((2, 2), 2.0 ** (0 if n else exponent)),) for n in range(axes))
    for _ in range(4):
        factors = balance(factors, [max_abs(parts) for parts in factors])
    exponents = [np.log2(part[0, 0]) for (part,) in factors]
    assert sum(exponents) == exponent
    assert np.ptp(exponents) < 32


def test_a_kept_preconditioner_is_the_square_of_the_factors():
    """At the start, and after a refresh; a direction by it is that by the factors."""
    rule = PublishedRefresh(initial_scale=16.0, cache_preconditioner=True)
    structures = structures_of(("dense", "diagonal"), (3, 4))
    rng = np.random.default_rng(0)
    gradient = np.float32(rng.standard_normal((3, 4)))
    given = {"structures": structures, "step": Step(jnp.int32(0), 0.3, 0.1, batch_size=4.0)}

    @jax.jit
    def step(gradient):
        first = rule.init(structures, [jnp.float32] * 2)
        refreshed = rule.refresh(first, gradient, **given)
        matrices = [
            [dense(structures, parts) for parts in (state.factors, state.preconditioners)]
            for state in (first, refreshed)
        ]
        return matrices, rule.precondition(refreshed, gradient, gradient=gradient, **given)[0]

    states, direction = jax.device_get(step(gradient))
    for ks, squares in states:
        chex.assert_trees_all_close(squares, [k @ k.T for k in ks], rtol=1e-5, atol=1e-6)
    assert all(np.abs(new - old).max() > 1e-2 for old, new in zip(*[ks for ks, _ in states], strict=True))
    np.testing.assert_allclose(direction, numpy_direction(gradient, states[1][0]), rtol=1e-4)


def test_the_published_start_is_at_a_number():
    structures = structures_of(("dense", "diagonal"), (3, 2))
    state = PublishedRefresh(initial_scale=16.0).init(structures, [jnp.float32] * 2)
    chex.assert_trees_all_close(dense(structures, state.factors), [16**-0.25 * np.eye(3), 16**-0.25 * np.eye(2)])
    [[vector]] = PublishedRefresh(initial_scale=16.0).init(structures[1:], [jnp.float32]).factors
    np.testing.assert_allclose(vector, 16**-0.5)


def test_first_preconditioners_beyond_the_range_of_half_precision_are_finite():
    rule = PublishedRefresh(initial_scale=1e-5, cache_preconditioner=True)
    [[products]] = rule.init(structures_of(("diagonal",), (4,)), [HALF]).preconditioners
    np.testing.assert_array_equal(products, np.full(4, 65504))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_largest_entry_is_not_finite_where_any_is_not(dtype):
    array = np.random.default_rng(0).normal(size=(64, 257)).astype(np.float32)
    largest = jax.jit(lambda array: max_abs((jnp.asarray(array, dtype), jnp.zeros(2, dtype))))
    assert largest(array) == jnp.abs(jnp.asarray(array, dtype)).max()
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for place in ((0, 0), (63, 256), (31, 100)):
            changed = array.copy()
            changed[place] = value
            assert not np.isfinite(np.float32(largest(changed)))

"""The inverse-free refresh and direction of one block, against dense float64 NumPy written from the equations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from rootfree_optax._src.blocks.factor_step import factor_steps, outer_products

from rootfree_optax._src.blocks import apply as preconditioning
from rootfree_optax._src.blocks import factor_update
from rootfree_optax._src.numerics.finite import max_abs
from rootfree_optax._src.structures import structure_factory

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


def numpy_refresh(samples, ks, ms, names, *, preconditioner_lr, damping, riemannian_momentum, batch_size):
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
        new_ks.append(k - preconditioner_lr / max(1, np.linalg.norm(m)) * k @ m)
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


SETTING = {"preconditioner_lr": 0.3, "damping": 0.05, "riemannian_momentum": 0.7, "batch_size": 8.0}
# The last number is the size of the gradient: with 0.05 no factor's step is clipped, with 2 every one is.
SETTINGS = [
    (SETTING, 0.05),
    (SETTING, 2.0),
    (SETTING | {"damping": 0.0, "batch_size": 1.0}, 0.05),
    (SETTING | {"damping": 3.0, "riemannian_momentum": 0.2, "preconditioner_lr": 0.02}, 2.0),
]


def float64_step(structures):
    """Returns a compiled refresh and application, from the parts to dense matrices."""

    @jax.jit
    def step(curvature, gradient, factors, momenta, **setting):
        new, new_momenta, *_ = factor_update.refresh(
            curvature, factors, momenta, structures=structures, count=jnp.int32(0), **setting
        )
        direction = preconditioning.precondition(gradient, new, structures=structures)
        matrices = [dense(structures, parts) if parts else [] for parts in (factors, momenta, new, new_momenta)]
        return matrices, direction

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
        (ks, _, new, none), _ = jax.device_get(float64_step(structures)(gradient, gradient, factors, (), **SETTING))
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
    return preconditioning.precondition(gradient, dense_pair(k, HALF), structures=structures)


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
    setting = {"preconditioner_lr": 0.5, "damping": 0.01, "batch_size": 1.0}

    @jax.jit
    def step(gradient, factors):
        new, *_ = factor_update.refresh(
            gradient, factors, (), structures=structures, riemannian_momentum=0.0, count=jnp.int32(0), **setting
        )
        return dense(structures, factors), dense(structures, new)

    ks, new = jax.device_get(step(*jax.tree.map(np.float32, (gradient, factors))))
    ks = [np.float64(k) for k in ks]
    zeros = [np.zeros_like(k) for k in ks]
    expected, _, _ = numpy_refresh([gradient], ks, zeros, names, riemannian_momentum=0.0, **setting)
    chex.assert_trees_all_close(new, [np.float32(k) for k in expected], rtol=1e-5, atol=1e-6)


@jax.jit
def refresh_matrix(gradient, factors, momenta):
    return factor_update.refresh(
        gradient,
        factors,
        momenta,
        structures=structures_of(("dense", "diagonal"), (3, 4)),
        preconditioner_lr=0.5,
        damping=0.1,
        riemannian_momentum=0.5,
        batch_size=2.0,
        count=jnp.int32(0),
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20], ids=str)
def test_a_refresh_that_is_not_finite_leaves_factors_and_momenta(value):
    structures = structures_of(("dense", "diagonal"), (3, 4))
    rng = np.random.default_rng(0)
    factors, momenta = (
        jax.tree.map(jnp.float32, random_parts(rng, structures, 0.2, identity=identity)) for identity in (True, False)
    )
    gradient = np.ones((3, 4), np.float32)
    gradient[1, 2] = value
    chex.assert_trees_all_equal(refresh_matrix(gradient, factors, momenta), (factors, momenta, (), (), ()))
    moved, *_ = refresh_matrix(np.ones((3, 4), np.float32), factors, momenta)
    assert all(np.abs(new - old).max() > 1e-2 for (new,), (old,) in zip(moved, factors, strict=True))


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

"""RF-Shampoo on one block, against float64 NumPy with explicit inverses and Kronecker products."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision

from rootfree_optax._src.blocks.rf import CholeskyInverse, RfState, cholesky, solve
from rootfree_optax._src.blocks.rule import Step
from rootfree_optax._src.structures.names import structure_factory

# Shape, structures, and the number of samples of the curvature (0: it is the gradient).
CASES = {
    "vector_dense": ((5,), ("dense",), 0),
    "matrix_dense": ((4, 3), ("dense", "dense"), 0),
    "matrix_dense_diagonal": ((4, 3), ("dense", "diagonal"), 3),
    "three_axes": ((3, 2, 4), ("diagonal", "dense", "dense"), 2),
    "four_axes": ((2, 3, 2, 2), ("dense", "diagonal", "dense", "dense"), 0),
}


def unfold(tensor, axis):
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def numpy_refresh(samples, matrices, names, *, weight, damping, batch_size):
    """Returns the new S of each axis, by the definition of H with the Kronecker product written out."""
    inverses = [np.linalg.inv(s) for s in matrices]
    new = []
    for n, (s, name) in enumerate(zip(matrices, names, strict=True)):
        others = inverses[:n] + inverses[n + 1 :]
        kronecker = functools.reduce(np.kron, others, np.eye(1))
        gram = np.mean([unfold(g, n) @ kronecker @ unfold(g, n).T for g in samples], axis=0)
        traces = np.prod([np.trace(inverse) for inverse in others])
        h = (batch_size * gram + damping * traces * np.eye(len(s))) / kronecker.shape[0]
        new.append((1 - weight) * s + weight * (np.diag(np.diag(h)) if name == "diagonal" else h))
    return new


def numpy_direction(gradient, matrices):
    for axis, s in enumerate(matrices):
        gradient = np.moveaxis(np.tensordot(np.linalg.inv(s), gradient, (1, axis)), 0, axis)
    return gradient


def random_factors(rng, names, shape):
    """Returns symmetric positive-definite factors, far from the identity."""

    def factor(name, d):
        root = np.eye(d) + 0.3 * rng.standard_normal((d, d))
        s = root @ root.T
        return (np.diag(s) if name == "diagonal" else s,)

    return tuple(map(factor, names, shape))


def dense(factors):
    return [np.diag(s) if s.ndim == 1 else s for (s,) in jax.device_get(factors)]


def compiled(names, shape):
    structures = tuple(structure_factory(name)(d) for name, d in zip(names, shape, strict=True))

    @jax.jit
    def step(curvature, gradient, factors, **numbers):
        rule, given = CholeskyInverse(), {"structures": structures, "step": Step(jnp.int32(0), **numbers)}
        state = rule.refresh(RfState(tuple((s,) for (s,) in factors), jnp.int32(0)), curvature, **given)
        return state, rule.precondition(state, gradient, gradient=gradient, **given)[0]

    return step


SETTING = {"weight": 0.3, "damping": 0.05, "batch_size": 8.0}
SETTINGS = [
    SETTING,
    SETTING | {"damping": 0.0, "batch_size": 1.0},
    SETTING | {"damping": 3.0, "weight": 1.0},
]


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_numpy(case):
    shape, names, samples = CASES[case]
    with double_precision():
        step = compiled(names, shape)
        for seed, setting in enumerate(SETTINGS):
            rng = np.random.default_rng(seed)
            factors = random_factors(rng, names, shape)
            gradient = rng.standard_normal(shape)
            curvature = rng.standard_normal((samples, *shape)) if samples else gradient
            (new, _), direction = step(curvature, gradient, factors, **setting)
            expected = numpy_refresh(curvature if samples else [gradient], dense(factors), names, **setting)
            assert all(np.abs(e - s).max() > 0.05 for e, s in zip(expected, dense(factors), strict=True))
            chex.assert_trees_all_close(dense(new), expected, rtol=1e-10, atol=1e-11)
            np.testing.assert_allclose(direction, numpy_direction(gradient, expected), rtol=1e-10, atol=1e-11)


def test_a_refresh_that_is_not_finite_is_refused_and_counted():
    """And a direction of a gradient that is not finite is that gradient: a solve would make NaN of all its entries."""
    names, shape = ("dense", "diagonal"), (4, 3)
    factors = jax.tree.map(jnp.float32, random_factors(np.random.default_rng(0), names, shape))
    gradient = np.ones(shape, np.float32)
    step = compiled(names, shape)
    new, _ = step(gradient, gradient, factors, **SETTING)
    assert new.refused == 0
    assert all(np.abs(a - b).max() > 1e-2 for (a,), (b,) in zip(new.factors, factors, strict=True))
    for value in (np.nan, np.inf, -np.inf, 1e20):
        gradient[1, 2] = value
        new, direction = step(gradient, gradient, factors, **SETTING)
        assert new.refused == 1
        chex.assert_trees_all_equal(new.factors, factors)
        if not np.isfinite(value):
            np.testing.assert_array_equal(direction, gradient)


def test_half_precision_gradients_are_computed_with_in_float32():
    """10⁴ squared, and 10⁻⁸ squared, are beyond float16's range."""
    names, shape = ("dense", "dense"), (4, 3)
    factors = jax.tree.map(jnp.float32, random_factors(np.random.default_rng(0), names, shape))
    step = compiled(names, shape)
    for size in (1e4, 1e-7):
        gradient = np.float16(size * np.random.default_rng(1).standard_normal(shape))
        setting = SETTING | {"batch_size": 1 / size**2}
        (new, _), direction = step(gradient, gradient, factors, **setting)
        wide = gradient.astype(np.float64)
        expected = numpy_refresh([wide], dense(factors), names, **setting)
        assert direction.dtype == jnp.float32
        chex.assert_trees_all_close(dense(new), [np.float32(s) for s in expected], rtol=1e-5, atol=1e-6)
        expected_direction = numpy_direction(wide, expected)
        np.testing.assert_allclose(direction, expected_direction, rtol=0, atol=1e-5 * np.abs(expected_direction).max())


def test_a_cpu_factorizes_one_matrix_at_a_time():
    """Several batches at once would wait for each other's threads for ever, on a machine of few."""
    factorize = jax.jit(jax.vmap(cholesky))
    matrices = jnp.stack([jnp.diag(jnp.array([4.0, scale])) for scale in (1.0, 9.0, 16.0)])
    np.testing.assert_allclose(factorize(matrices), np.sqrt(matrices))
    text = factorize.lower(matrices).as_text()
    operands = [line for line in text.splitlines() if "potrf" in line or "stablehlo.cholesky" in line]
    assert operands
    assert all("tensor<2x2xf32>" in line and "tensor<3x2x2xf32>" not in line for line in operands)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cpu_solves_with_one_matrix_at_a_time(transposed):
    solve_all = jax.jit(jax.vmap(lambda lower, tensor: solve(lower, tensor, 1, transposed=transposed)))
    rng = np.random.default_rng(0)
    lowers = np.tril(rng.normal(size=(3, 4, 4))) + 3 * np.eye(4)
    tensors = rng.normal(size=(3, 2, 4, 5))
    expected = [
        np.einsum("ij,ajb->aib", np.linalg.inv(lower.T if transposed else lower), tensor)
        for lower, tensor in zip(lowers, tensors, strict=True)
    ]
    arguments = jnp.asarray(lowers, jnp.float32), jnp.asarray(tensors, jnp.float32)
    np.testing.assert_allclose(solve_all(*arguments), expected, rtol=1e-4, atol=1e-5)
    operands = [
        line
        for line in solve_all.lower(*arguments).as_text().splitlines()
        if "triangular_solve" in line or "trsm" in line
    ]
    assert operands
    assert all("tensor<3x4x4xf32>" not in line for line in operands)

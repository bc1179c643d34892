"""Short neighbouring axes folded into one, against float64 NumPy axis by axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import in_contract

from rootfree_optax._src.blocks.apply import apply_factors, count_other_transposes, fold
from rootfree_optax._src.blocks.curvature import curvatures_along
from rootfree_optax._src.blocks.sirf import outer_products
from rootfree_optax._src.structures.names import dense, diagonal

# Lengths, which of them are diagonal, and the groups that they fold into.
CASES = {
    "kernel": ((3, 3, 8, 12), (), ((0, 1), (2,), (3,))),
    "three": ((2, 1, 3, 40), (), ((0, 1, 2), (3,))),
    "in the middle": ((40, 2, 3), (), ((0,), (1, 2))),
    "a diagonal between": ((3, 3, 3, 40), (1,), ((0,), (1,), (2,), (3,))),
    "too long together": ((6, 6, 40), (), ((0,), (1,), (2,))),
    "long beside the rest": ((3, 4, 5), (), ((0,), (1,), (2,))),
    "matrix": ((4, 3), (), ((0,), (1,))),
}


def structures_of(name):
    lengths, diagonals, _ = CASES[name]
    return [diagonal(d) if n in diagonals else dense(d) for n, d in enumerate(lengths)]


def drawn(name, dtype):
    rng = np.random.default_rng(0)
    parts = [jnp.asarray(rng.standard_normal(s.part_shapes[0]), dtype) for s in structures_of(name)]
    matrices = [np.diag(np.float64(p)) if p.ndim == 1 else np.float64(p) for p in parts]
    return structures_of(name), tuple((part,) for part in parts), matrices


def multiplied(tensor, matrices):
    for axis, matrix in enumerate(matrices, start=tensor.ndim - len(matrices)):
        tensor = np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)
    return tensor


@pytest.mark.parametrize("name", CASES)
def test_folds_short_dense_neighbours(name):
    structures, factors, _ = drawn(name, jnp.float32)
    assert fold(structures, factors).groups == CASES[name][2]


def test_matrices_of_a_narrow_range_or_of_two_dtypes_stay_apart():
    structures, factors, _ = drawn("kernel", jnp.float16)
    assert all(len(group) == 1 for group in fold(structures, factors).groups)
    structures, factors, _ = drawn("kernel", jnp.float32)
    mixed = ((factors[0][0].astype(jnp.bfloat16),), *factors[1:])
    assert all(len(group) == 1 for group in fold(structures, mixed).groups)


SAMPLES = ((), (1,), (5,))
BATCH_SIZE = 2.0


def draw_gradient(name, samples=()):
    return np.float32(np.random.default_rng(1).standard_normal((*samples, *CASES[name][0])))


@functools.cache
def computed(dtype):
    """Returns each case's outer products for each number of samples, and directions by factors and by squares."""

    @jax.jit
    def compute(gradients, factors):
        found = {}
        for name, k in factors.items():
            structures = structures_of(name)
            outers = [outer_products(g, structures, k, batch_size=BATCH_SIZE) for g in gradients[name]]
            squares = tuple(s.square(parts) for s, parts in zip(structures, k, strict=True))
            apply = functools.partial(apply_factors, gradients[name][0], structures=structures)
            found[name] = outers, apply(k, transposed_first=True), apply(squares, transposed_first=False)
        return found

    gradients = {name: [draw_gradient(name, samples) for samples in SAMPLES] for name in CASES}
    return jax.device_get(compute(gradients, {name: drawn(name, dtype)[1] for name in CASES}))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), in_contract("bfloat16", 0.03)])
@pytest.mark.parametrize("name", CASES)
def test_outer_products_are_those_of_each_axis(name, dtype, tolerance):
    structures, _, matrices = drawn(name, dtype)
    lengths = CASES[name][0]
    for samples, found in zip(SAMPLES, computed(dtype)[name][0], strict=True):
        x = multiplied(np.float64(draw_gradient(name, samples)), [matrix.T for matrix in matrices])
        x = x.reshape(-1, *lengths) * np.sqrt(BATCH_SIZE)
        for n, (parts, d) in enumerate(zip(found, lengths, strict=True)):
            unfolding = np.moveaxis(x, n + 1, 0).reshape(d, -1)
            expected = unfolding @ unfolding.T / len(x) / (np.prod(lengths) / d)
            assert parts[0].shape == structures[n].part_shapes[0]  # of an axis of length one, a diagonal's
            expected = np.diagonal(expected) if parts[0].ndim == 1 else expected
            np.testing.assert_allclose(parts[0], expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), in_contract("bfloat16", 0.03)])
@pytest.mark.parametrize("name", CASES)
def test_directions_are_those_of_all_axes(name, dtype, tolerance):
    _, _, matrices = drawn(name, dtype)
    expected = multiplied(np.float64(draw_gradient(name)), [matrix @ matrix.T for matrix in matrices])
    _, by_factors, by_squares = computed(dtype)[name]
    np.testing.assert_allclose(by_factors, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    if dtype == "float32":
        np.testing.assert_allclose(by_squares, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, in_contract(jnp.bfloat16)], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("samples", [(), in_contract((5,))], ids=str)
def test_curvatures_are_those_of_each_axis(dtype, samples):
    """Of an axis's matrix the others' factors are part, those of its own group, too."""
    drawn_cases = {name: drawn(name, dtype) for name in CASES}
    given = {name: (draw_gradient(name, samples), factors) for name, (_, factors, _) in drawn_cases.items()}
    compute = lambda given: {n: curvatures_along(g, structures_of(n), k) for n, (g, k) in given.items()}
    found = jax.jit(compute)(given)
    for name, (structures, _, matrices) in drawn_cases.items():
        gradients = np.float64(given[name][0]).reshape(-1, *CASES[name][0])
        for n, structure in enumerate(structures):
            others = [np.eye(len(k)) if m == n else k.T for m, k in enumerate(matrices)]
            z = np.moveaxis(multiplied(gradients, others), n + 1, 0).reshape(structure.dim, -1)
            expected = z @ z.T * structure.dim / gradients.size
            expected = np.diagonal(expected) if structure.is_diagonal else expected
            [part] = found[name][n]
            tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
            np.testing.assert_allclose(part, expected.reshape(part.shape), rtol=0, atol=tolerance * expected.max())


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ((9, 64, 128), [2, 2, 1]),
        ((9, 64, 64), [2, 1, 2]),
        ((128, 64, 9), [1, 2, 2]),
        ((4, 5, 6, 7), [2, 2, 2, 2]),
        ((5, 6), [1, 1]),
        ((5,), [0]),
    ],
)
def test_axes_share_products_and_the_longest_has_the_fewest(lengths, counts):
    structures = [dense(d) for d in lengths]
    assert count_other_transposes(structures) == counts
    factors = [(jnp.eye(d),) for d in lengths]
    program = jax.make_jaxpr(lambda g: curvatures_along(g, structures, factors))(jnp.ones(lengths))
    products = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    assert len(products) == sum(counts) + len(lengths)

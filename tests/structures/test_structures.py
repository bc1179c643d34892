"""What holds for every structure, against dense float64 algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import in_contract
from double_precision import double_precision
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_optax._src.structures.base import Flops
from rootfree_optax._src.structures.names import STRUCTURE_NAMES, structure_factory
from rootfree_optax._src.structures.toeplitz import TriangularToeplitz

NAMES = (*STRUCTURE_NAMES, "block3diagonal", "hierarchical3_2", "tril4bottomrightdiag", "triu3topleftdiag")

every_structure = pytest.mark.parametrize("name", NAMES)


def to_jax(arrays, dtype):
    return tuple(jnp.asarray(array.astype(dtype)) for array in arrays)


def to_float64(tree):
    return jax.tree.map(lambda array: np.asarray(array).astype(np.float64), tree)


def random_parts(rng, structure, *stack):
    return [rng.standard_normal((*stack, *shape)) for shape in structure.part_shapes]


@functools.cache
def basis(structure):
    """Returns the matrices of which one stored number is one and the others are zero, [numbers, d, d]."""
    sizes = [int(np.prod(shape)) for shape in structure.part_shapes]
    units = np.split(np.eye(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1], axis=1)
    parts = tuple(unit.reshape(-1, *shape) for unit, shape in zip(units, structure.part_shapes, strict=True))
    return np.asarray(jax.jit(jax.vmap(structure.to_dense))(parts), np.float64)


def dense(structure, parts):
    """Returns the matrix in float64."""
    numbers = np.concatenate([np.ravel(part) for part in parts]).astype(np.float64)
    return np.tensordot(numbers, basis(structure), 1)


def multiplicities(structure):
    """Returns how often a projection counts each entry: twice where its mirror image is outside the structure."""
    support = basis(structure).any(0)
    return 1 + (support & ~support.T)


def pictured_support(name, dim):
    """Returns where a matrix of the named structure may be non-zero, written down from its picture."""
    i, j = np.indices((dim, dim))

    def hierarchical(top, bottom):
        return (i < top) | ((i >= max(dim - bottom, top)) & (j >= top))

    return (i == j) | {
        "dense": i == i,
        "diagonal": i == j,
        "block30diagonal": i // 30 == j // 30,
        "block3diagonal": i // 3 == j // 3,
        "hierarchical15_15": hierarchical(15, 15),
        "hierarchical3_2": hierarchical(3, 2),
        "triltoeplitz": i >= j,
        "triutoeplitz": i <= j,
        "trilbottomrightdiag": j == 0,
        "triltopleftdiag": i == dim - 1,
        "triubottomrightdiag": i == 0,
        "triutopleftdiag": j == dim - 1,
        "tril4bottomrightdiag": j < 4 if dim > 4 else i == i,
        "triu3topleftdiag": j >= dim - 3,
    }[name]


def multiply_along(matrix, tensor, axis):
    return np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)


def operations(structure, axis):
    """Returns all operations on matrices L, R and a tensor, as one function."""
    return lambda left, right, tensor: (
        structure.matmul(left, right),
        structure.apply(left, tensor, axis),
        structure.apply(left, tensor, axis, transposed=True),
        structure.project_outer(tensor, axis),
        structure.project_inner(left),
        structure.squared_norm(left),
    )


def assert_agrees(structure, axis, operands, results, *, tolerance):
    """Asserts that results of `operations` are dense algebra's, up to `tolerance` times the sums of magnitudes."""
    left, right = (dense(structure, parts) for parts in operands[:2])
    tensor = operands[2]
    unfolded = np.moveaxis(tensor, axis, 0).reshape(structure.dim, -1)
    product, applied, transposed, outer, inner, squared_norm = results

    def close(got, expected, magnitude):
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.max(magnitude))

    close(dense(structure, product), left @ right, abs(left) @ abs(right))
    close(applied, multiply_along(left, tensor, axis), multiply_along(abs(left), abs(tensor), axis))
    close(transposed, multiply_along(left.T, tensor, axis), multiply_along(abs(left.T), abs(tensor), axis))
    for projected, symmetric in ((outer, unfolded @ unfolded.T), (inner, left.T @ left)):
        # What defines the projection, on every matrix L of a basis: ⟨Π̂(S), L⟩ = ⟨S, L'⟩.
        got = np.tensordot(basis(structure), dense(structure, projected), 2)
        expected = np.tensordot(basis(structure) * multiplicities(structure), symmetric, 2)
        close(got, expected, np.trace(symmetric))
    np.testing.assert_allclose(squared_norm, np.sum(left**2), rtol=tolerance)


def check_stack(name, dim, others, axis, dtype):
    """Checks all operations on a stack of two."""
    structure = structure_factory(name)(dim)
    rng = np.random.default_rng(dim)
    left, right = (to_jax(random_parts(rng, structure, 2), dtype) for _ in range(2))
    (tensor,) = to_jax([rng.standard_normal((2, *others[:axis], dim, *others[axis:]))], dtype)

    results = jax.jit(jax.vmap(operations(structure, axis)))(left, right, tensor)

    assert all(result.dtype == jnp.float32 for result in jax.tree.leaves(results))
    for n in range(2):
        operands, values = to_float64(
            jax.tree.map(lambda array, n=n: np.asarray(array)[n], ((left, right, tensor), results))
        )
        # The products of bfloat16 numbers are exact in float32, in which they are summed.
        assert_agrees(structure, axis, operands, values, tolerance=2e-6)


@st.composite
def problems(draw):
    others = draw(st.lists(st.integers(1, 4), max_size=2))
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    return draw(st.sampled_from(NAMES)), draw(st.integers(1, 40)), others, draw(st.integers(0, len(others))), dtype


@pytest.mark.parametrize("name", [*NAMES[:4], *map(in_contract, NAMES[4:])])
def test_operations_on_a_stack_agree_with_dense_algebra(name):
    check_stack(name, 37, [2, 3], 1, jnp.bfloat16)


@pytest.mark.contract
@given(problems())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_operations_of_any_size_agree_with_dense_algebra(problem):
    check_stack(*problem)


@pytest.mark.contract
@every_structure
def test_operations_on_one_matrix_accumulate_in_float64(name):
    with double_precision():
        structure = structure_factory(name)(11)
        rng = np.random.default_rng(0)
        left, right = (to_jax(random_parts(rng, structure), np.float64) for _ in range(2))
        (tensor,) = to_jax([rng.standard_normal((11, 3))], np.float64)
        results = jax.jit(operations(structure, 0))(left, right, tensor)
        assert all(result.dtype == jnp.float64 for result in jax.tree.leaves(results))
        assert_agrees(structure, 0, *to_float64(((left, right, tensor), results)), tolerance=1e-14)


@every_structure
@pytest.mark.parametrize("dim", [1, 2, 5, 29, 64])
def test_matrices_are_zero_where_pictured(name, dim):
    structure = structure_factory(name)(dim)
    assert structure.dim == dim
    np.testing.assert_array_equal(basis(structure).any(0), pictured_support(name, dim))


@every_structure
def test_every_number_is_stored_once(name):
    structure = structure_factory(name)(40)
    matrices = basis(structure)
    if not isinstance(structure, TriangularToeplitz):
        np.testing.assert_array_equal(matrices.sum(0), matrices.any(0))
        assert set(matrices.sum((1, 2))) == {1.0}
    else:  # a Toeplitz matrix stores each diagonal once
        assert len(matrices) == 40
        sign = -1 if structure.lower else 1
        for offset, matrix in enumerate(matrices):
            np.testing.assert_array_equal(matrix, np.eye(40, k=sign * offset))


@every_structure
def test_identity_and_zeros(name):
    structure = structure_factory(name)(7)
    for dtype in (jnp.float32, jnp.bfloat16):
        identity, zeros = structure.identity(dtype), structure.zeros(dtype)
        assert all(part.dtype == dtype for part in (*identity, *zeros))
        assert tuple(part.shape for part in identity) == structure.part_shapes
        np.testing.assert_array_equal(dense(structure, identity), np.eye(7))
        np.testing.assert_array_equal(dense(structure, zeros), np.zeros((7, 7)))


@pytest.mark.parametrize("name", ["dense", "diagonal", "block3diagonal", in_contract("block5diagonal")])
@pytest.mark.parametrize("dtype", [jnp.float32, in_contract(jnp.bfloat16)])
def test_roots_agree_with_dense_algebra(name, dtype):
    structure = structure_factory(name)(11)
    parts = to_jax(random_parts(np.random.default_rng(0), structure), dtype)
    half = jax.jit(structure.symmetric_root)(parts)
    shifted = structure.add_identity(half, 0.1 * np.linalg.norm(dense(structure, half), 2))
    root = jax.jit(structure.positive_root)(shifted, np.linalg.eigvalsh(dense(structure, shifted)).min())
    assert all(part.dtype == jnp.float32 for part in (*half, *root))
    square = dense(structure, structure.square(parts))
    half, shifted, root = (dense(structure, parts) for parts in (half, shifted, root))
    np.testing.assert_array_equal(half, half.T)
    assert min(*np.linalg.eigvalsh(half), *np.linalg.eigvalsh(root)) > 0
    np.testing.assert_allclose(half @ half, square, atol=2e-5 * np.linalg.norm(square, 2))
    np.testing.assert_allclose(root @ root, shifted, atol=2e-5 * np.linalg.norm(shifted, 2))


@pytest.mark.parametrize("name", ["dense", "diagonal", "block3diagonal", "block5diagonal"])
@pytest.mark.parametrize("dtype", [jnp.float32, in_contract(jnp.bfloat16)])
def test_a_refresh_of_the_factor_agrees_with_dense_algebra(name, dtype):
    """KᵀSK, its trace, and K (a·I + E)^(−1/2)."""
    structure, rng = structure_factory(name)(11), np.random.default_rng(0)
    k = to_jax(random_parts(rng, structure), dtype)
    s, e = (structure.square(to_jax(random_parts(rng, structure), jnp.float32)) for _ in range(2))
    product, trace = jax.jit(structure.congruence)(k, s), jax.jit(structure.trace)(s)
    found = jax.jit(structure.times_inverse_root)(k, e, shift=0.9)
    assert all(part.dtype == jnp.float32 for part in (*product, trace, *found))
    k, s, e, product, found = (dense(structure, parts) for parts in (k, s, e, product, found))
    np.testing.assert_allclose(product, k.T @ s @ k, atol=1e-5 * np.linalg.norm(k.T @ s @ k, 2))
    np.testing.assert_allclose(trace, np.trace(s), rtol=1e-5)
    values, vectors = np.linalg.eigh(0.9 * np.eye(11) + e)
    expected = k @ (vectors * values**-0.5) @ vectors.T
    tolerance = 2e-3 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(found, expected, atol=tolerance * np.linalg.norm(k, 2))


@pytest.mark.parametrize("name", ["triltoeplitz", "hierarchical3_2"])
def test_what_needs_transposes_is_an_error_for_a_set_without_them(name):
    structure = structure_factory(name)(11)
    identity = structure.identity(jnp.float32)
    positive_root = functools.partial(structure.positive_root, least=1.0)
    of_one = (structure.square, structure.symmetric_root, positive_root, structure.trace)
    of_two = (structure.congruence, functools.partial(structure.times_inverse_root, shift=0.9))
    for operation, operands in [(each, 1) for each in of_one] + [(each, 2) for each in of_two]:
        with pytest.raises(ValueError, match=f"closed under transposition, got '{name}'"):
            operation(*[identity] * operands)


def intermediates(jaxpr):
    """Yields every equation's primitive and outputs, those of inner functions included."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from intermediates(value.jaxpr)
        yield equation


def traced(structure, axis, shape):
    parts = structure.identity(jnp.float32)
    jaxpr = jax.make_jaxpr(operations(structure, axis))(parts, parts, jnp.zeros(shape))
    return list(intermediates(jaxpr.jaxpr))


@every_structure
def test_nothing_of_d_squared_numbers_is_formed_but_by_dense(name):
    dim = 64
    equations = traced(structure_factory(name)(dim), 0, (dim, 3))
    largest = max(variable.aval.size for equation in equations for variable in equation.outvars)
    assert (largest >= dim * dim) == (name == "dense")


@pytest.mark.parametrize("axis", [0, 1])
def test_dense_takes_one_product_for_each_operation(axis):
    equations = traced(structure_factory("dense")(8), axis, (8, 8))
    names = [equation.primitive.name for equation in equations]
    assert names.count("dot_general") == 5
    assert names.count("transpose") == 0  # XLA for CPUs would copy


def test_a_square_takes_one_product():
    structure = structure_factory("dense")(8)
    jaxpr = jax.make_jaxpr(structure.square)(structure.identity(jnp.float32))
    assert [equation.primitive.name for equation in intermediates(jaxpr.jaxpr)] == ["dot_general"]


def test_diagonal_takes_no_matrix_product():
    names = [equation.primitive.name for equation in traced(structure_factory("diagonal")(8), 1, (2, 8, 3))]
    assert "dot_general" not in names


def counted_flops(operation, *operands):
    """Returns the floating-point operations of the matrix products in a function."""
    total = 0
    for equation in intermediates(jax.make_jaxpr(operation)(*operands).jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            summed = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2 * int(summed) * equation.outvars[0].aval.size
    return total


@pytest.mark.parametrize(("name", "dim"), [("dense", 9), ("block3diagonal", 11), ("hierarchical15_15", 27)])
def test_flops_are_those_of_the_products(name, dim):
    structure = structure_factory(name)(dim)
    parts, tensor = structure.identity(jnp.float32), jnp.zeros((dim, 5))
    assert structure.flops(5) == Flops(
        apply=counted_flops(lambda: structure.apply(parts, tensor, 0)),
        project_outer=counted_flops(lambda: structure.project_outer(tensor, 0)),
        matmul=counted_flops(lambda: structure.matmul(parts, parts)),
        project_inner=counted_flops(lambda: structure.project_inner(parts)),
    )


def test_flops_of_structures_without_matrix_products():
    assert structure_factory("diagonal")(10).flops(3) == Flops(apply=60, project_outer=60, matmul=20, project_inner=20)
    dense_cost, toeplitz_cost = (structure_factory(name)(512).flops(512) for name in ("dense", "triltoeplitz"))
    assert toeplitz_cost.apply < dense_cost.apply / 2
    assert toeplitz_cost.matmul < dense_cost.matmul / 1000

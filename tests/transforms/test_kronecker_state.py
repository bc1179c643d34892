"""The two Kronecker transformations: dtypes, programs, the state and its readers."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from checks import in_contract
from kronecker_runs import SETTING, draw, factors_of, scale_by_published
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.blocks.curvature import RootFree

BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))


def dtypes_of(parts_of_stacks):
    return [[part.dtype for part in jax.tree.leaves(parts)] for parts in parts_of_stacks]


@pytest.mark.parametrize(
    ("rule", "vector", "matrix"),
    [
        (None, [F32], [F16, F16]),
        (jnp.bfloat16, [BF16], [BF16, BF16]),
        ("float32", [F32], [F32, F32]),
        ({1: jnp.bfloat16}, [BF16], [F16, F16]),
        ({1: jnp.float16, 2: (None, jnp.bfloat16)}, [F16], [F16, BF16]),
    ],
    ids=str,
)
def test_dtypes_of_the_state(rule, vector, matrix):
    params = {"b": jnp.zeros(3, F32), "k": jnp.zeros((3, 2), F16)}
    tx = scale_by_published(layout=whole(factor_dtype=rule), **SETTING)
    state = jax.eval_shape(tx.init, params)
    assert dtypes_of(factors_of(state)) == [vector, matrix]
    gradients = {"b": jnp.zeros(3, BF16), "k": jnp.zeros((3, 2), F32)}
    directions, after = jax.eval_shape(tx.update, gradients, state, params)
    assert dtypes_of(factors_of(after)) == dtypes_of(s.block.momenta for s in after.stacks) == [vector, matrix]
    assert (directions["b"].dtype, directions["k"].dtype) == (BF16, F32)


def test_a_dtype_for_each_axis():
    params = {"k": jnp.zeros((3, 1, 2))}
    tx = scale_by_published(layout=whole(factor_dtype=(jnp.bfloat16, None)), **SETTING)
    assert dtypes_of(factors_of(jax.eval_shape(tx.init, params))) == [[BF16, F32]]


def test_factors_with_inverses_are_in_single_precision_at_least():
    state = jax.eval_shape(rf.published.scale_by_rf_shampoo(**SETTING).init, {"k": jnp.zeros((3, 2), F16)})
    assert dtypes_of(factors_of(state)) == [[F32, F32]]


def equations(jaxpr, outside=()):
    """Yields every equation, those of inner functions included, but for those inside of operations named so."""
    for equation in jaxpr.eqns:
        yield equation
        for value in () if equation.primitive.name in outside else equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    yield from equations(inner, outside)
                elif hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr, outside)


# Each of the structures, in sizes that show the whole of it.
ALL_STRUCTURES = {
    "a": ("dense", "diagonal"),
    "b": ("block2diagonal", "dense"),
    "c": ("triltoeplitz", "triutoeplitz"),
    "d": ("trilbottomrightdiag", "triutopleftdiag"),
    "e": ("triubottomrightdiag", "triltopleftdiag"),
    "f": ("hierarchical2_2", "diagonal"),
}


# Those that each form has: all, those closed under transposition, those that hold their inverses.
PATHS = {scale_by_published: "abcdef", rf.scale_by_sirf_shampoo: "ab", rf.published.scale_by_rf_shampoo: "a"}


def traced(make, **options):
    """Returns the traced update of a form on all of its structures."""
    paths = PATHS[make]
    params = {path: jnp.zeros((7, 5)) for path in paths}
    tx = make(layout=whole(structure=lambda path, _: ALL_STRUCTURES[path]), **options)
    return jax.jit(functools.partial(tx.update, batch_size=4)).trace(params, jax.eval_shape(tx.init, params))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("make", "fewest"),
    [(scale_by_published, 40), (rf.scale_by_sirf_shampoo, 30), (rf.published.scale_by_rf_shampoo, 1)],
)
def test_precision_reaches_every_product(make, fewest):
    """But the sum of a direction's squares, and KᵀSK, which is always at the highest."""
    always = {(jax.lax.Precision.HIGHEST,) * 2} if make is rf.scale_by_sirf_shampoo else set()
    for precision in (jax.lax.Precision.HIGHEST, None):
        jaxpr = traced(make, precision=precision).jaxpr
        products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        found = [e.params["precision"] for e in products if e.outvars[0].aval.ndim > 1]
        assert len(found) >= fewest
        assert set(found) == {None if precision is None else (precision, precision)} | always


def test_products_are_named_by_what_they_are_for():
    """In profiles and in the program, whichever is not the sum of a direction's squares."""
    params = {"w": jnp.zeros((4, 3))}
    tx = rf.scale_by_sirf_shampoo(refresh_every=3)
    text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    names = set(re.findall(r'op_name="([^"]*dot_general[^"]*)"', text))
    scopes = ("statistics", "refresh", "apply")
    found = {scope: [name for name in names if re.search(rf"\b{scope}\b", name)] for scope in scopes}
    assert all(found.values())
    assert sum(map(len, found.values())) == len(names) - 1


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "statistics_every": 5}], ids=str)
def test_a_step_without_refresh_packs_the_gradients_once(options):
    params = {name: jnp.zeros((4, 6)) for name in "abc"}
    tx = rf.scale_by_kronecker(RootFree(), refresh_every=10, **options)
    jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params)).jaxpr
    packs = lambda found: sum(e.primitive.name == "concatenate" and e.outvars[0].aval.shape[0] == 3 for e in found)
    assert packs(equations(jaxpr, outside=("cond",))) == 1
    assert packs(equations(jaxpr)) > 1  # a refresh packs its curvature


# An operation, or the call of a library, that decomposes a matrix or solves with one.
DECOMPOSITION = re.compile(
    r"cholesky|eig|syev|heev|svd|gesdd|(?<!s)qr|householder|triangular|trsm|potrf|getr|inverse|lu_|lapack|solver",
    re.IGNORECASE,
)


def decompositions(make):
    """Returns the operations and called functions of the update's program that decompose a matrix or solve."""
    text = traced(make).lower().as_text()
    operations = set(re.findall(r"stablehlo\.(\w+)", text)) | set(re.findall(r"call @([\w.]+)", text))
    assert {"dot_general", "multiply"} <= operations
    return {name for name in operations if DECOMPOSITION.search(name)}


@pytest.mark.parametrize("make", [in_contract(scale_by_published), rf.scale_by_sirf_shampoo])
def test_the_inverse_free_program_decomposes_nothing(make):
    assert decompositions(make) == set()


def test_the_search_for_decompositions_finds_those_of_the_form_with_inverses():
    assert len(decompositions(rf.published.scale_by_rf_shampoo)) >= 2


@pytest.mark.contract
def test_bfloat16_products_of_every_shape_run():
    """Of a single vector they have no stack to go over, and X Xᵀ has no columns to sum."""
    layout = whole(structure=lambda path, _: path)
    shapes = {"dense": (7,), "hierarchical2_1": (7,), "block2diagonal": (4, 3)}
    gradient = jax.tree.map(lambda g: g[0], draw(shapes, steps=1))

    @jax.jit
    def direction(gradient):
        half, single = (
            scale_by_published(layout=dataclasses.replace(layout, factor_dtype=dtype), **SETTING)
            for dtype in (jnp.bfloat16, jnp.float32)
        )
        return half.update(gradient, half.init(gradient))[0], single.update(gradient, single.init(gradient))[0]

    found, expected = jax.device_get(direction(gradient))
    chex.assert_trees_all_close(found, expected, rtol=0, atol=16 * float(jnp.finfo(jnp.bfloat16).eps))

"""The two Kronecker transformations: dtypes, programs, the state and its readers."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kronecker_runs import SETTING, draw, scale_by_exact, scale_by_published

import rootfree_optax as rf

BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))


def dtypes_of(state):
    return [[part.dtype for part in jax.tree.leaves(stack)] for stack in state]


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
    tx = scale_by_published(preconditioner_dtype=rule, **SETTING)
    state = jax.eval_shape(tx.init, params)
    assert dtypes_of(state.factors) == [vector, matrix]
    gradients = {"b": jnp.zeros(3, BF16), "k": jnp.zeros((3, 2), F32)}
    directions, after = jax.eval_shape(tx.update, gradients, state, params)
    assert dtypes_of(after.factors) == dtypes_of(after.momenta) == [vector, matrix]
    assert (directions["b"].dtype, directions["k"].dtype) == (BF16, F32)


def test_a_dtype_for_each_axis():
    params = {"k": jnp.zeros((3, 1, 2))}
    tx = scale_by_published(preconditioner_dtype=(jnp.bfloat16, None), **SETTING)
    assert dtypes_of(jax.eval_shape(tx.init, params).factors) == [[BF16, F32]]


def test_factors_with_inverses_are_in_single_precision_at_least():
    state = jax.eval_shape(rf.scale_by_rf_shampoo(**SETTING).init, {"k": jnp.zeros((3, 2), F16)})
    assert dtypes_of(state.factors) == [[F32, F32]]


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


# Each of the structures once, in sizes that show the whole of it.
ALL_STRUCTURES = {
    "a": ("dense", "diagonal"),
    "b": ("block2diagonal", "hierarchical2_2"),
    "c": ("triltoeplitz", "triutoeplitz"),
    "d": ("trilbottomrightdiag", "triutopleftdiag"),
    "e": ("triubottomrightdiag", "triltopleftdiag"),
}


# Those that each form has: all, those with an inverse root in closed form, those whose inverses have their structure.
PATHS = {scale_by_published: "abcde", scale_by_exact: "abe", rf.scale_by_rf_shampoo: "a"}


def tree_of(make):
    paths = PATHS[make]
    return {path: jnp.zeros((7, 5)) for path in paths}, rf.Layout(structure=lambda path, _: ALL_STRUCTURES[path])


@pytest.mark.parametrize(
    ("make", "fewest"), [(scale_by_published, 40), (scale_by_exact, 60), (rf.scale_by_rf_shampoo, 1)]
)
def test_precision_reaches_every_product(make, fewest):
    params, layout = tree_of(make)
    always = {(jax.lax.Precision.HIGHEST,) * 2} if make is scale_by_exact else set()  # what corners are eliminated with
    for precision in (jax.lax.Precision.HIGHEST, None):
        tx = make(layout=layout, precision=precision, **SETTING)
        jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params)).jaxpr
        found = [e.params["precision"] for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        assert len(found) >= fewest
        assert set(found) == {None if precision is None else (precision, precision)} | always


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "curvature_every": 5}], ids=str)
def test_a_step_without_refresh_packs_the_gradients_once(options):
    params = {name: jnp.zeros((4, 6)) for name in "abc"}
    tx = rf.scale_by_sirf_shampoo(update_every=10, batch_size=1, **options)
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
    """Returns the operations and called functions of the compiled update that decompose a matrix or solve."""
    params, layout = tree_of(make)
    tx = make(layout=layout, **SETTING)
    text = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params)).compile().as_text()
    operations = re.findall(r"^\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", text, re.MULTILINE)
    operations += re.findall(r'custom_call_target="([^"]+)"', text)
    assert {"fusion", "parameter", "tuple"} <= set(operations)
    return {name for name in operations if DECOMPOSITION.search(name)}


@pytest.mark.parametrize("make", [scale_by_published, scale_by_exact])
def test_the_inverse_free_program_decomposes_nothing(make):
    assert decompositions(make) == set()


def test_the_search_for_decompositions_finds_those_of_the_form_with_inverses():
    assert len(decompositions(rf.scale_by_rf_shampoo)) >= 2


def whole(transformation):
    return optax.chain(optax.clip_by_global_norm(1.0), transformation, optax.trace(0.9), optax.scale(-0.1))


@pytest.mark.parametrize(
    ("wrap", "owned"),
    [
        (whole, "vw"),
        (lambda tx: optax.masked(whole(tx), {"v": False, "w": True}), "w"),
        (lambda tx: optax.MultiSteps(whole(tx), 2), "vw"),
        (lambda tx: optax.inject_hyperparams(lambda lr: optax.chain(tx, optax.scale(lr)))(0.1), "vw"),
        (lambda tx: optax.partition({"tx": whole(tx), "sgd": optax.sgd(0.1)}, {"v": "sgd", "w": "tx"}), "w"),
    ],
    ids=["chain", "masked", "multi_steps", "inject_hyperparams", "partition"],
)
def test_factors_are_found_in_the_state_of_a_whole_optimizer(wrap, owned):
    layout = rf.Layout(layer_axes={"w": 0}, block_size=3, structure={1: "diagonal", 2: ("dense", "triltoeplitz")})
    params = {"v": jnp.zeros(2), "w": jnp.zeros((2, 3, 5))}
    tx = wrap(scale_by_published(layout=layout, **SETTING))
    state = jax.eval_shape(tx.init, params)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: np.float32(rng.standard_normal(leaf.shape)), state)
    is_bare = lambda node: isinstance(node, rf.ScaleBySirfShampooState)
    (bare,) = filter(is_bare, jax.tree.leaves(state, is_leaf=is_bare))
    plan = layout.plan({name: params[name] for name in owned})
    found = plan.factors(state)
    assert set(found) == {"w[0; 0, 0]", "w[0; 0, 1]", "w[1; 0, 0]", "w[1; 0, 1]", *({"v"} & set(owned))}
    assert len({float(matrices[0][0, 0]) for matrices in found.values()}) == len(found)
    chex.assert_trees_all_equal(found, plan.factors(bare))


BYTES = [(None, 0.5), (jnp.bfloat16, 0.5), ((jnp.bfloat16, None), None)]


@pytest.mark.parametrize(("dtype", "momentum"), BYTES, ids=str)
def test_the_plan_knows_the_bytes_of_the_state(dtype, momentum):
    params, layout = tree_of(scale_by_published)
    tx = scale_by_published(layout=layout, preconditioner_dtype=dtype, riemannian_momentum=momentum, batch_size=1)
    state = jax.eval_shape(tx.init, params)
    real = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.factors, state.momenta)))
    plan = dataclasses.replace(layout, factor_dtype=dtype).plan(params)
    assert plan.state_bytes(riemannian_momentum=momentum is not None) == real > 0


def test_bfloat16_products_of_every_shape_run():
    """Of a single vector they have no stack to go over, and X Xᵀ has no columns to sum."""
    layout = rf.Layout(structure=lambda path, _: path)
    shapes = {"dense": (7,), "hierarchical2_1": (7,), "block2diagonal": (4, 3)}
    gradient = jax.tree.map(lambda g: g[0], draw(shapes, steps=1))

    @jax.jit
    def direction(gradient):
        half, single = (
            scale_by_published(layout=layout, preconditioner_dtype=dtype, **SETTING)
            for dtype in (jnp.bfloat16, jnp.float32)
        )
        return half.update(gradient, half.init(gradient))[0], single.update(gradient, single.init(gradient))[0]

    found, expected = jax.device_get(direction(gradient))
    chex.assert_trees_all_close(found, expected, rtol=0, atol=16 * float(jnp.finfo(jnp.bfloat16).eps))


def test_a_plan_without_parameters_has_no_factors():
    assert rf.Layout().plan({}).factors(rf.scale_by_sirf_shampoo().init({})) == {}

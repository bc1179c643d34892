"""The inverse root within patterns that have couplings, against the conditions for the least objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rootfree_optax._src.structures import BlockDiagonal, BlockPattern, structure_factory

SHIFT = 0.9
PATTERNS = {
    **{name: structure_factory(name)(9) for name in ("triltopleftdiag", "triu3bottomrightdiag")},
    "hierarchical": structure_factory("hierarchical3_2")(9),
    "blocks": BlockPattern((BlockDiagonal(1, 2), BlockDiagonal(1, 3), BlockDiagonal(2, 2)), ((0, 1), (0, 2), (1, 2))),
}


SIZES = (1e4, 1e12, 1e24)


def excess_of(columns, smallest=1.0):
    """Returns E of that many columns' rank, its columns down to the smallest."""
    x = np.random.default_rng(0).standard_normal((9, columns)) * np.geomspace(1, smallest, columns)
    return x @ x.T


def pattern_of(structure):
    return np.asarray(structure.to_dense(tuple(map(jnp.ones_like, structure.identity(jnp.float32))))) > 0


def inverse_roots(structure, factor, excesses):
    """Returns each K C as a matrix; what is projected is E, by way of one of its roots."""
    values, vectors = np.linalg.eigh(np.stack(excesses))
    roots = jnp.asarray(vectors * np.sqrt(np.maximum(values, 0))[:, None], jnp.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def run(factor, root):
        parts = structure.project_outer(root, 0, precision="highest")
        return structure.to_dense(structure.times_inverse_root(factor, parts, shift=SHIFT))

    return np.asarray(run(factor, roots), np.float64)


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_within_the_pattern_is_better_and_no_step_unbounded(name):
    structure, excesses = PATTERNS[name], [excess_of(2), excess_of(30), 30 * excess_of(30, 1e-2)]
    spikes = [size * excesses[0] for size in SIZES]
    cs = inverse_roots(structure, structure.identity(jnp.float32), excesses + spikes)
    assert np.all(np.linalg.slogdet(cs)[0] > 0)
    pattern, identity = pattern_of(structure), np.eye(9)
    for c, excess in zip(cs, excesses, strict=False):
        # The derivative of Tr(CᵀMC) − 2 log|det C| along C·N is zero for every N of the pattern.
        whitened = c.T @ (SHIFT * identity + excess) @ c
        np.testing.assert_allclose(whitened[pattern], identity[pattern], atol=1e-2)  # the polynomials' error, at most
        assert np.abs(whitened[~pattern]).max() > 0.1
    for c, excess in zip(cs[len(excesses) :], spikes, strict=True):
        assert np.all(np.linalg.norm(c, axis=0) < 1.1 * SHIFT**-0.5)
        m = SHIFT * identity + excess
        assert np.trace(c.T @ m @ c) < 5e-3 * np.trace(m)


def test_in_half_precision_a_factor_costs_no_more_than_its_rounding():
    structure, excesses = PATTERNS["hierarchical"], [excess_of(30)]
    rng = np.random.default_rng(1)
    parts = jax.tree.map(
        lambda i: i + jnp.asarray(0.3 * rng.standard_normal(i.shape), i.dtype), structure.identity(jnp.bfloat16)
    )
    [c] = inverse_roots(structure, structure.identity(jnp.float32), excesses)
    [found] = inverse_roots(structure, parts, excesses)
    np.testing.assert_allclose(found, np.float64(structure.to_dense(parts)) @ c, atol=1e-5)


@pytest.mark.parametrize("name", ["triutopleftdiag", "tril3bottomrightdiag", "triltoeplitz"])
def test_a_corner_whose_columns_reach_the_diagonal_has_none(name):
    structure = structure_factory(name)(9)
    identity = structure.identity(jnp.float32)
    assert not structure.has_inverse_root
    with pytest.raises(ValueError, match=f"closed form.*{name}"):
        structure.times_inverse_root(identity, identity, shift=SHIFT)


def test_a_non_finite_excess_gives_a_non_finite_result():
    structure = PATTERNS["triu3bottomrightdiag"]
    corner, *others = structure.identity(jnp.float32)
    excess = (corner.at[0, 0].set(jnp.nan), *others)
    result = structure.times_inverse_root(structure.identity(jnp.float32), excess, shift=SHIFT)
    assert not all(np.isfinite(part).all() for part in result)

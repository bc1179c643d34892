"""The exact refresh of structures with corners, against float64 with inverses."""

import jax.numpy as jnp
import numpy as np
import pytest
from kronecker_runs import draw, run, scale_by_exact
from layouts import whole

from rootfree_optax._src.structures import structure_factory

BETA, DAMPING, BATCH_SIZE = 0.1, 0.01, 4


def pattern_of(structure):
    return np.asarray(structure.to_dense(tuple(map(jnp.ones_like, structure.identity(jnp.float32))))) > 0


def best_within(structure, m):
    """Returns the C of a structure with the least Tr(CᵀMC) − 2 log|det C|: columns of one pattern together."""
    pattern, c = pattern_of(structure), np.zeros_like(m)
    for k in range(len(m)):
        columns = [j for j in range(len(m)) if (pattern[:, j] == pattern[:, k]).all()]
        rows = [i for i in np.flatnonzero(pattern[:, k]) if i not in columns]
        y = np.linalg.solve(m[np.ix_(rows, rows)], m[np.ix_(rows, columns)])
        values, vectors = np.linalg.eigh(m[np.ix_(columns, columns)] - m[np.ix_(columns, rows)] @ y)
        root = (vectors * values**-0.5) @ vectors.T
        c[np.ix_(columns, columns)], c[np.ix_(rows, columns)] = root, -y @ root
    return c


def best_steps(structures, gradients):
    """Yields directions after S ← (1 − β₂)·S + β₂·H, H not projected, and K then the best within its structure."""
    ks = [np.eye(structure.dim) for structure in structures]
    for gradient in np.float64(gradients):
        x = np.sqrt(BATCH_SIZE) * ks[0].T @ gradient @ ks[1]
        traces = [np.sum(np.square(k)) for k in ks]
        hs = [
            (outer + DAMPING * traces[1 - n] * ks[n].T @ ks[n]) / structures[1 - n].dim
            for n, outer in enumerate((x @ x.T, x.T @ x))
        ]
        ms = [(1 - BETA) * np.eye(len(h)) + BETA * h for h in hs]
        ks = [k @ best_within(structure, m) for k, structure, m in zip(ks, structures, ms, strict=True)]
        yield ks[0] @ ks[0].T @ gradient @ ks[1] @ ks[1].T


@pytest.mark.parametrize(
    ("names", "dtype", "tolerance"),
    [
        (("tril2topleftdiag", "triu2bottomrightdiag"), "float32", 1e-4),
        (("hierarchical2_1", "dense"), "float32", 1e-4),
        (("hierarchical2_1", "dense"), "bfloat16", 0.05),
    ],
    ids=str,
)
def test_every_step_is_the_best_within_the_structure(names, dtype, tolerance):
    gradients = draw({"w": (6, 5), "other": (6, 5)}, steps=30)  # one stack of two blocks
    layout = whole(structure=names, factor_dtype=dtype)
    tx = scale_by_exact(weight=BETA, damping=DAMPING, batch_size=BATCH_SIZE, layout=layout)
    directions, _ = run(tx, gradients)
    structures = [structure_factory(name)(d) for name, d in zip(names, (6, 5), strict=True)]
    for block, found in directions.items():
        for direction, expected in zip(found, best_steps(structures, gradients[block]), strict=True):
            assert np.abs(direction - expected).max() < tolerance * np.abs(expected).max()

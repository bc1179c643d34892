"""What the Kronecker methods owe to having no root: two forms that agree, and iterates without a coordinate system."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import in_contract
from kronecker_runs import factors_of, scale_by_published, sirf_published, with_factors
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.structures.names import structure_factory

BATCH, STEPS, TOLERANCE = 32, 15, 1e-5
SETTING = {"preconditioner_lr": 0.2, "damping": 0.0, "momentum": 0.8, "weight_decay": 0.1, "batch_size": BATCH}


def multiply(tensor, matrices):
    for axis, matrix in enumerate(matrices):
        tensor = jnp.moveaxis(jnp.tensordot(matrix, tensor, (1, axis)), 0, axis)
    return tensor


def numpy_multiply(tensor, matrices):
    for axis, matrix in enumerate(matrices):
        tensor = np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)
    return tensor


class Block(NamedTuple):
    """What `with_factors` replaces: factors of a block, of a stack, of a state."""

    factors: tuple


class StackState(NamedTuple):
    block: Block


class ShampooState(NamedTuple):
    stacks: tuple[StackState, ...]


def root_based_shampoo(learning_rate: float, *, preconditioner_lr: float, batch_size: int, **others: Any):
    """Shampoo as published but for a moving average: S ← (1−β)S + βB·G₍ₙ₎G₍ₙ₎ᵀ, direction G ×ₙ Sₙ^(−1/2N)."""
    del others

    def init(params):
        return ShampooState((StackState(Block(tuple((jnp.eye(d)[None],) for d in params.shape))),))

    def update(gradient, state, params=None):
        del params
        new, direction = [], gradient
        for axis, (s,) in enumerate(factors_of(state)[0]):
            unfolded = jnp.moveaxis(gradient, axis, 0).reshape(s.shape[-1], -1)
            s = (1 - preconditioner_lr) * s[0] + preconditioner_lr * batch_size * unfolded @ unfolded.T
            values, vectors = jnp.linalg.eigh(s)
            root = (vectors * jnp.expand_dims(values ** (-0.5 / gradient.ndim), 0)) @ vectors.T
            direction = jnp.moveaxis(jnp.tensordot(root, direction, (1, axis)), 0, axis)
            new.append((s[None],))
        return -learning_rate * direction, with_factors(state, [new])

    return optax.chain(optax.GradientTransformation(init, update))


def mismatch(tx, start, reparameterised_factors, changes):
    """Returns how far the mapped-back iterates in other coordinates are from the iterates, per distance travelled.

    θ = θ' multiplied along every axis by A: the loss in θ' is another function, its gradient another array.

    Args:
      tx: a chain with the preconditioner first.
      start: the parameter.
      reparameterised_factors: each factor's parts that correspond to what the state starts with.
      changes: the matrix A of each axis.
    """
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((BATCH, start.size)), jnp.float32)
    targets = jnp.asarray(rng.standard_normal(BATCH), jnp.float32)

    @jax.jit
    def iterates(factors, start, changes):
        def loss(param):
            errors = inputs @ multiply(param, changes).reshape(-1) - targets
            return jnp.mean(jnp.log(jnp.cosh(errors)))

        def step(carry, _):
            param, state = carry
            updates, state = tx.update(jax.grad(loss)(param), state, param)
            param = optax.apply_updates(param, updates)
            return (param, state), multiply(param, changes)

        first, *others = tx.init(start)
        factors = jax.tree.map(lambda part: jnp.expand_dims(part, 0), factors)
        _, history = jax.lax.scan(step, (start, (with_factors(first, [factors]), *others)), length=STEPS)
        return history

    original = jax.tree.map(lambda part: np.asarray(part)[0], factors_of(tx.init(start)[0])[0])
    identities, inverses = [np.eye(len(a), dtype=np.float32) for a in changes], [np.linalg.inv(a) for a in changes]
    expected = np.asarray(iterates(original, start, identities))
    found = np.asarray(iterates(reparameterised_factors, numpy_multiply(start, inverses), changes))
    assert np.all(np.isfinite(expected))
    return np.abs(found - expected).max() / np.abs(expected - start).max()


def start_of(shape):
    return np.float32(np.random.default_rng(1).standard_normal(shape))


def dense_changes(shape):
    """Returns matrices that are neither symmetric nor orthogonal, of condition number three."""
    rng = np.random.default_rng(2)
    rotation = lambda d: np.linalg.qr(rng.standard_normal((d, d)))[0]
    return [np.float32(rotation(d) * np.geomspace(0.6, 1.8, d) @ rotation(d)) for d in shape]


# All of the structures, with sizes that show the whole of them on five and four rows.
PAIRS = (
    ("dense", "triltoeplitz"),
    ("triutoeplitz", "diagonal"),
    ("hierarchical2_1", "block2diagonal"),
    ("trilbottomrightdiag", "triutopleftdiag"),
    ("triu2bottomrightdiag", "tril2topleftdiag"),
)


@pytest.mark.parametrize("names", [*PAIRS[:1], *map(in_contract, PAIRS[1:])], ids="-".join)
def test_inverse_free_iterates_do_not_depend_on_coordinates_within_the_structure(names):
    """A is any invertible matrix of the structure, which K' = A⁻¹K then is too. The norm that clips is the same."""
    shape = (5, 4)
    structures = [structure_factory(name)(d) for name, d in zip(names, shape, strict=True)]
    rng = np.random.default_rng(3)
    inverse = tuple(
        tuple(np.float32(part + 0.2 * rng.standard_normal(part.shape)) for part in s.identity(np.float32))
        for s in structures
    )
    to_dense = jax.jit(lambda inverse: [s.to_dense(parts) for s, parts in zip(structures, inverse, strict=True)])
    changes = [np.linalg.inv(matrix) for matrix in to_dense(inverse)]
    assert all(1.2 < np.linalg.cond(matrix) < 20 for matrix in changes)
    tx = sirf_published(0.05, riemannian_momentum=0.5, layout=whole(structure=names), **SETTING)
    assert mismatch(tx, start_of(shape), inverse, changes) < TOLERANCE


def test_nor_for_three_axes():
    shape = (3, 2, 4)
    changes = dense_changes(shape)
    inverse = tuple((np.linalg.inv(a),) for a in changes)
    tx = sirf_published(0.05, riemannian_momentum=None, layout=whole(structure="dense"), **SETTING)
    assert all(1.2 < np.linalg.cond(matrix) < 20 for matrix in changes)
    assert mismatch(tx, start_of(shape), inverse, changes) < TOLERANCE


def congruent(changes):
    """Returns S' = AᵀSA of S = I."""
    return tuple((a.T @ a,) for a in changes)


def test_nor_do_those_with_inverses():
    shape = (5, 4)
    changes = dense_changes(shape)
    tx = rf.published.rf_shampoo(0.05, layout=whole(structure="dense"), **SETTING)
    assert mismatch(tx, start_of(shape), congruent(changes), changes) < TOLERANCE


def test_the_root_breaks_that_invariance():
    """The same experiment with Shampoo's roots, to show that the property above is one that can fail."""
    shape = (5, 4)
    changes = dense_changes(shape)
    tx = root_based_shampoo(0.05, **SETTING)
    assert mismatch(tx, start_of(shape), congruent(changes), changes) > 0.2


def test_a_structure_breaks_it_for_coordinates_outside():
    """Π̂ is right for changes of coordinates within the structure only."""
    shape = (5, 4)
    changes = dense_changes(shape)
    inverse = tuple((np.diag(np.linalg.inv(a)),) for a in changes)
    tx = sirf_published(0.05, layout=whole(structure="diagonal"), **SETTING)
    assert mismatch(tx, start_of(shape), inverse, changes) > 0.2


@pytest.mark.parametrize(
    ("shape", "structure"), [((3,), ("dense",)), ((2, 4, 3), ("diagonal", "dense", "dense"))], ids=str
)
def test_the_two_forms_agree_to_second_order(shape, structure):
    """One step from any K, and S = (K Kᵀ)⁻¹, too short for the clip: its error falls by four when β₂ is halved.

    A wrong term, or factor of one, would be an error of first order.
    """
    rng = np.random.default_rng(4)
    gradient = jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32)
    ks = [np.eye(d) + 0.1 * rng.standard_normal((d, d)) for d in shape]
    ks = [np.diag(k) if name == "diagonal" else k for k, name in zip(ks, structure, strict=True)]
    curvatures = [1 / k**2 if k.ndim == 1 else np.linalg.inv(k @ k.T) for k in ks]

    def direction(tx, factors):
        factors = tuple((jnp.asarray(factor[None], jnp.float32),) for factor in factors)
        return tx.update(gradient, with_factors(tx.init(gradient), [factors]))[0]

    @jax.jit
    @jax.vmap
    def directions(preconditioner_lr):
        setting = {"damping": 0.8, "batch_size": 4, "layout": whole(structure=structure)}
        inverse_free = scale_by_published(preconditioner_lr, riemannian_momentum=None, **setting)
        with_inverses = rf.published.scale_by_rf_shampoo(preconditioner_lr, **setting)
        return direction(inverse_free, ks), direction(with_inverses, curvatures)

    inverse_free, with_inverses = jax.device_get(directions(jnp.array([0.04, 0.02, 0.01, 0.0])))
    largest = lambda array: np.abs(array).max(axis=tuple(range(1, array.ndim)))
    change, error = largest(with_inverses - with_inverses[3]), largest(inverse_free - with_inverses)
    assert error[3] < 1e-5 < change[2] / 100
    np.testing.assert_allclose(error[:2] / error[1:3], 4, atol=0.5)

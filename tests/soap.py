"""SOAP (Vyas et al., https://arxiv.org/abs/2409.11321) as a user's block rule, written with the public interface alone.

The current gradient is in the second moment, and the refresh comes before the direction, where the official code steps
first. Axes with a diagonal factor are not rotated.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import rootfree_optax as rf


class SoapState(NamedTuple):
    """What a block keeps.

    Attributes:
      factors: the parts of each axis's eigenvectors Q.
      statistics: the parts of each axis's average L of G₍ₙ₎G₍ₙ₎ᵀ.
      nu: the average of the squared gradient in the eigenvectors' coordinates, [d₁, …, d_N].
      weight: the sum of the weights in both averages.
      is_started: whether the block has seen a gradient.
    """

    factors: tuple
    statistics: tuple
    nu: jax.Array
    weight: jax.Array
    is_started: jax.Array


@dataclasses.dataclass(frozen=True)
class Soap(rf.BlockRule):
    """Adam in the eigenvectors of Shampoo's statistics; β₂ is 1 − weight, ε the damping."""

    def supports(self, structure):
        """Refuses structures whose eigenvectors are not in them."""
        return None if structure.name in ("dense", "diagonal") else "SOAP needs dense or diagonal factors."

    def init(self, structures, dtypes):
        """Returns the state of a block that has seen no gradient."""
        dtype = max([jnp.dtype(jnp.float32), *dtypes], key=lambda dtype: dtype.itemsize)
        nu = jnp.zeros([structure.dim for structure in structures], dtype)
        identities = tuple(structure.identity(dtype) for structure in structures)
        zeros = tuple(structure.zeros(dtype) for structure in structures)
        return SoapState(identities, zeros, nu, jnp.zeros([], dtype), jnp.zeros([], bool))

    def waits(self, state):
        """Returns whether the block has seen no gradient."""
        return ~state.is_started

    def start(self, state, gradient, *, structures, step):
        """Sets Q to the eigenvectors of the first gradient's G₍ₙ₎G₍ₙ₎ᵀ, the largest eigenvalue first."""
        outers = _outer_products(_as_samples(gradient, state), structures)
        factors = tuple(
            (jnp.linalg.eigh(*h)[1][:, ::-1],) if _is_matrix(h) else q
            for q, h in zip(state.factors, outers, strict=True)
        )
        return state._replace(factors=factors, is_started=jnp.ones_like(state.is_started))

    def observe(self, state, gradient, *, structures, step):
        """Averages G₍ₙ₎G₍ₙ₎ᵀ and the squared rotated gradient; one that is not finite is left out."""
        samples = _as_samples(gradient, state)
        squares = jnp.sum(jnp.square(_rotate(samples, state.factors, structures)), axis=0)
        old = (state.statistics, state.nu, state.weight)
        new = (_outer_products(samples, structures), squares, jnp.ones_like(state.weight))
        weight = jnp.asarray(step.weight, state.nu.dtype)
        new = jax.tree.map(lambda o, n: (1 - weight) * o + weight * n, old, new)
        is_finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]
        keep = functools.reduce(jnp.logical_and, is_finite, state.is_started)
        statistics, nu, weight = jax.tree.map(lambda o, n: jnp.where(keep, n, o), old, new)
        return state._replace(statistics=statistics, nu=nu, weight=weight)

    def refresh(self, state, gradient, *, structures, step):
        """Takes a power step, Q ← qr(L Q), with the columns in the order of their Rayleigh quotients qᵀLq."""
        factors, nu = [], state.nu
        for axis, (q, h) in enumerate(zip(state.factors, state.statistics, strict=True)):
            if _is_matrix(q):
                order = jnp.argsort(-jnp.sum(q[0] * (h[0] @ q[0]), axis=0))
                q, nu = (jnp.linalg.qr(h[0] @ q[0][:, order])[0],), jnp.take(nu, order, axis)
            factors.append(q)
        new = state._replace(factors=tuple(factors), nu=nu)
        return jax.tree.map(lambda n, o: jnp.where(state.is_started, n, o), new, state)

    def precondition(self, state, momentum, *, gradient, structures, step):
        """Returns Adam's direction in the eigenvectors' coordinates, mapped back."""
        [rotated] = _rotate(momentum[None], state.factors, structures)
        root = jnp.sqrt(state.nu / jnp.where(state.weight > 0, state.weight, 1))
        direction = rotated / (root + jnp.asarray(step.damping, root.dtype))
        for axis, (structure, q) in enumerate(zip(structures, state.factors, strict=True)):
            direction = structure.apply(q, direction, axis)
        return direction, state


def _is_matrix(parts):
    return parts[0].ndim == 2  # a diagonal is a vector, and so is a matrix of one row


def _as_samples(gradient, state):
    """Returns [samples, d₁, …, d_N], whose outer products and squares add up to the mean over samples."""
    samples = gradient.reshape(-1, *state.nu.shape).astype(state.nu.dtype)
    return samples / len(samples) ** 0.5


def _outer_products(samples, structures):
    return tuple(structure.project_outer(samples, axis) for axis, structure in enumerate(structures, start=1))


def _rotate(samples, factors, structures):
    for axis, (structure, q) in enumerate(zip(structures, factors, strict=True), start=1):
        samples = structure.apply(q, samples, axis, transposed=True)
    return samples


def scale_by_soap(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    damping: optax.ScalarOrSchedule = 1e-8,
    *,
    refresh_every: int = 10,
    layout: rf.Layout = rf.Layout(diagonal=None, merge_dims=None),  # noqa: B008  # a frozen value
    mesh_axes: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients by Adam in the eigenvectors of Shampoo's statistics."""
    options = {"refresh_every": refresh_every, "statistics_every": 1, "layout": layout, "mesh_axes": mesh_axes}
    return rf.scale_by_kronecker(Soap(), weight=1 - b2, damping=damping, momentum=b1, **options)

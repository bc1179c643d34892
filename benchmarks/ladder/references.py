"""Methods that the library's are compared with, from their formulas: of one matrix each, for all matrices at once.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon), SOAP (Vyas et al., https://arxiv.org/abs/2409.11321),
and Online KL-Shampoo (the recursion of KL-Shampoo, https://arxiv.org/abs/2509.03378, with new roots at every step).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

MatrixStep = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
"""From a gradient [m, n], the matrix's state and the count of past steps to a direction and the new state."""

_multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Polar Express (Amsel et al., https://arxiv.org/abs/2505.16932), a little too short on purpose, then Newton–Schulz's
# own quintic. They orthogonalize singular values from about 1e-4 to 1.
_POLAR_EXPRESS = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    *4 * ((1.875, -1.25, 0.375),),
)


class MatricesState(NamedTuple):
    """Past steps, and the states of all matrices, stacked by shape."""

    count: jax.Array
    stacks: dict[str, Any]


def on_matrices(
    start: Callable[[jax.Array], Any], step: MatrixStep, *, rms: ArrayLike | None, blocks: int | None = None
) -> optax.GradientTransformation:
    """Maps the mathematics of one matrix over a tree, all matrices of a shape at once.

    Args:
      start: from a matrix of zeros to its state.
      step: see `MatrixStep`.
      rms: the root mean square that each parameter's direction is scaled to. None: the direction's own.
      blocks: matrices are cut into square blocks of this length, along axes that it divides. None: none are.
    """

    def init(params: Any) -> MatricesState:
        stacks = _stack(jax.tree.leaves(params), blocks)
        return MatricesState(
            jnp.zeros([], jnp.int32), {k: jax.vmap(start)(jnp.zeros_like(x)) for k, x in stacks.items()}
        )

    def update(updates: Any, state: MatricesState, params: Any = None) -> tuple[Any, MatricesState]:
        del params
        leaves, tree = jax.tree.flatten(updates)
        of_stack = jax.vmap(step, (0, 0, None))
        results = {k: of_stack(g, state.stacks[k], state.count) for k, g in _stack(leaves, blocks).items()}
        directions = _unstack({k: direction for k, (direction, _) in results.items()}, leaves, blocks)
        if rms is not None:
            directions = [rms * d / (jnp.sqrt(jnp.mean(jnp.square(d))) + 1e-30) for d in directions]
        stacks = {k: new for k, (_, new) in results.items()}
        return jax.tree.unflatten(tree, directions), MatricesState(state.count + 1, stacks)

    return optax.GradientTransformation(init, update)


def _cut(leaf: jax.Array, blocks: int | None) -> tuple[int, int, int, int]:
    """Returns number and length of the blocks along rows, and along columns; a kernel's columns are its last axis."""
    rows, columns = math.prod(leaf.shape[:-1]), leaf.shape[-1]
    lengths = [blocks if blocks is not None and length % blocks == 0 else length for length in (rows, columns)]
    return rows // lengths[0], lengths[0], columns // lengths[1], lengths[1]


def _stack(leaves: list[jax.Array], blocks: int | None) -> dict[str, jax.Array]:
    parts: dict[str, list[jax.Array]] = {}
    for leaf in leaves:
        down, m, across, n = _cut(leaf, blocks)
        parts.setdefault(f"{m}x{n}", []).append(leaf.reshape(down, m, across, n).swapaxes(1, 2).reshape(-1, m, n))
    return {key: jnp.concatenate(of_shape) for key, of_shape in parts.items()}


def _unstack(stacks: Mapping[str, jax.Array], leaves: list[jax.Array], blocks: int | None) -> list[jax.Array]:
    used: dict[str, int] = {}
    result = []
    for leaf in leaves:
        down, m, across, n = _cut(leaf, blocks)
        first = used.get(key := f"{m}x{n}", 0)
        used[key] = first + down * across
        of_leaf = stacks[key][first : used[key]]
        result.append(of_leaf.reshape(down, across, m, n).swapaxes(1, 2).reshape(leaf.shape))
    return result


def _average(old: jax.Array, new: jax.Array, decay: ArrayLike) -> jax.Array:
    return decay * old + (1 - decay) * new


def muon(
    *, rms: ArrayLike = 0.2, momentum: ArrayLike = 0.95, blocks: int | None = None
) -> optax.GradientTransformation:
    """Muon: Nesterov's average of the gradients, orthogonalized by five quintic Newton–Schulz steps.

    Its default length, a root mean square of 0.2, is AdamW's usual one (Moonlight, https://arxiv.org/abs/2502.16982).
    """

    def step(g: jax.Array, average: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        del count
        average = _average(average, g, momentum)
        x = _average(average, g, momentum)
        x = x / (jnp.linalg.norm(x) + 1e-30)
        a, b, c = _QUINTIC
        for _ in range(5):
            if x.shape[0] <= x.shape[1]:
                square = x @ x.T
                x = a * x + (b * square + c * square @ square) @ x
            else:
                square = x.T @ x
                x = a * x + x @ (b * square + c * square @ square)
        return x, average

    return on_matrices(jnp.zeros_like, step, rms=rms, blocks=blocks)


class OnlineState(NamedTuple):
    """Online KL-Shampoo's of one matrix: average gradient, two factors, and their inverse roots."""

    average: jax.Array
    rows: jax.Array
    columns: jax.Array
    row_root: jax.Array
    column_root: jax.Array


def inverse_root(s: jax.Array) -> jax.Array:
    """Returns S^(−1/2) of a symmetric positive definite matrix by ten coupled Newton–Schulz steps."""
    size = jnp.linalg.norm(s) * 1.01 + 1e-30
    identity = jnp.eye(len(s))
    y, z = s / size, identity
    for a, b, c in _POLAR_EXPRESS:
        product = _multiply(z, y)
        polynomial = a * identity + b * product + c * _multiply(product, product)
        y, z = _multiply(y, polynomial), _multiply(polynomial, z)
    return (z + z.T) / (2 * jnp.sqrt(size))


def okls(
    *,
    rms: ArrayLike = 0.4,
    momentum: ArrayLike = 0.95,
    statistics_decay: ArrayLike = 0.95,
    eps: ArrayLike = 1e-12,
    damping: ArrayLike = 1e-6,
    blocks: int | None = None,
) -> optax.GradientTransformation:
    """Online KL-Shampoo: S_a ← b₂ S_a + (1 − b₂) G P_b P_b Gᵀ / n + ε I, S_b alike, P = S^(−1/2), D = P_a M P_b.

    The gradient at hand is in the factors that precondition it. `damping` is added to a factor before its root,
    relative to its mean eigenvalue: in float32 a root by products needs a bound on the condition number.
    """
    damped = lambda s: s + damping * jnp.trace(s) / len(s) * jnp.eye(len(s))

    def start(x: jax.Array) -> OnlineState:
        m, n = x.shape
        zeros = lambda d: jnp.zeros((d, d))
        return OnlineState(x, zeros(m), zeros(n), zeros(m), zeros(n))

    def first_factor(g: jax.Array) -> jax.Array:
        m, n = g.shape
        s = jnp.sqrt(m / n) / (jnp.linalg.norm(g) + 1e-30) * g @ g.T
        return s + (jnp.linalg.norm(s) / jnp.sqrt(m) + 1e-30) * jnp.eye(m)

    def step(g: jax.Array, state: OnlineState, count: jax.Array) -> tuple[jax.Array, OnlineState]:
        m, n = g.shape
        average = _average(state.average, g, momentum)
        x, y = g @ state.column_root, state.row_root @ g
        later = lambda old, new: statistics_decay * old + (1 - statistics_decay) * new + eps * jnp.eye(len(new))
        rows = jnp.where(count == 0, first_factor(g), later(state.rows, x @ x.T / n))
        columns = jnp.where(count == 0, first_factor(g.T), later(state.columns, y.T @ y / m))
        roots = inverse_root(damped(rows)), inverse_root(damped(columns))
        direction = roots[0] @ _average(average, g, momentum) @ roots[1]
        return direction, OnlineState(average, rows, columns, *roots)

    return on_matrices(start, step, rms=rms, blocks=blocks)


class SoapState(NamedTuple):
    """SOAP's of one matrix: average gradient and square in the eigenbasis, two factors and their eigenbases."""

    average: jax.Array
    square: jax.Array
    rows: jax.Array
    columns: jax.Array
    row_basis: jax.Array
    column_basis: jax.Array


def soap(
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    statistics_decay: ArrayLike = 0.95,
    refresh_every: int = 10,
    eps: ArrayLike = 1e-8,
    blocks: int | None = None,
) -> optax.GradientTransformation:
    """SOAP: Adam in the eigenbasis of Shampoo's factors, which one power step and a QR decomposition renew.

    The first gradient gives the first basis (ten such steps instead of an eigendecomposition) and no update.
    """

    def start(x: jax.Array) -> SoapState:
        m, n = x.shape
        return SoapState(x, x, jnp.zeros((m, m)), jnp.zeros((n, n)), jnp.eye(m), jnp.eye(n))

    def renew(s: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the new basis and the order, by estimated eigenvalue, in which it takes the old one's columns."""
        moved = _multiply(s, basis)
        order = jnp.argsort(-jnp.sum(basis * moved, 0))
        return jnp.linalg.qr(moved[:, order])[0], order

    def first_basis(s: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 10, lambda _, basis: renew(s, basis)[0], jnp.eye(len(s)))

    def refresh(state: SoapState) -> SoapState:
        row_basis, row_order = renew(state.rows, state.row_basis)
        column_basis, column_order = renew(state.columns, state.column_basis)
        return state._replace(
            square=state.square[row_order][:, column_order], row_basis=row_basis, column_basis=column_basis
        )

    def begin(state: SoapState) -> SoapState:
        return state._replace(row_basis=first_basis(state.rows), column_basis=first_basis(state.columns))

    def step(g: jax.Array, state: SoapState, count: jax.Array) -> tuple[jax.Array, SoapState]:
        rotate = lambda x: state.row_basis.T @ x @ state.column_basis
        later = count > 0
        average = jnp.where(later, _average(state.average, g, b1), state.average)
        square = jnp.where(later, _average(state.square, jnp.square(rotate(g)), b2), state.square)
        seen = jnp.maximum(count, 1)
        adam = rotate(average) / (1 - b1**seen) / (jnp.sqrt(square / (1 - b2**seen)) + eps)
        direction = jnp.where(later, state.row_basis @ adam @ state.column_basis.T, 0)
        average_factor = lambda old, new: jnp.where(later, _average(old, new, statistics_decay), new)
        state = state._replace(
            average=average,
            square=square,
            rows=average_factor(state.rows, g @ g.T),
            columns=average_factor(state.columns, g.T @ g),
        )
        # The count is the same for all matrices and runs, so that only one branch is taken.
        branch = jnp.where(count == 0, 0, jnp.where(count % refresh_every == 0, 1, 2))
        return direction, jax.lax.switch(branch, [begin, refresh, lambda same: same], state)

    return on_matrices(start, step, rms=None, blocks=blocks)

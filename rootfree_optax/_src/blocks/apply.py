"""How the factors of ONE block apply to a tensor, short axes folded.

A product along a short axis has little to compute: what it costs is one pass over the tensor. Along two of them, such
as a convolution's 3×3, it costs one pass, too, by the Kronecker product of their matrices: K₁ ⊗ K₂ along the folded
axis of length d₁d₂.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rootfree_optax._src.numerics.arithmetic import (
    accumulation_dtype,
    exponent_of,
    has_smaller_range,
    max_abs,
    power_of_two,
    upcast,
)
from rootfree_optax._src.structures.base import Parts, Structure, times_scalar
from rootfree_optax._src.structures.names import dense

_LONGEST = 32  # rows of a Kronecker product: one with more would cost more than the passes that it saves

Groups = tuple[tuple[int, ...], ...]


class Folded(NamedTuple):
    """A block's structures and matrices after folding.

    Attributes:
      groups: which axes became one.
      structures: of the folded axes.
      matrices: the parts for each of these.
    """

    groups: Groups
    structures: tuple[Structure, ...]
    matrices: tuple[Parts, ...]


def fold(structures: Sequence[Structure], matrices: Sequence[Parts]) -> Folded:
    """Folds neighbouring dense axes, as long as their product is short beside the rest of the tensor.

    Matrices of a dtype with a narrow range (float16) stay apart, as their products might leave it.

    Args:
      structures: the structure of each axis.
      matrices: the parts for each axis.
    """
    groups = group_axes(structures, [parts[0].dtype for parts in matrices])
    folded = [
        matrices[group[0]] if len(group) == 1 else (functools.reduce(jnp.kron, [matrices[n][0] for n in group]),)
        for group in groups
    ]
    return Folded(groups, fold_structures(structures, groups), tuple(folded))


def fold_structures(structures: Sequence[Structure], groups: Groups) -> tuple[Structure, ...]:
    """Returns the structures of the folded axes."""
    length_of = [structure.dim for structure in structures]
    return tuple(
        [
            structures[group[0]] if len(group) == 1 else dense(math.prod([length_of[n] for n in group]))
            for group in groups
        ]
    )


def fold_axes(tensor: jax.Array, axes: int, structures: Sequence[Structure]) -> jax.Array:
    """Returns a tensor [d₁, …, d_N] or [samples, d₁, …, d_N], of N = `axes`, with the axes of the folded structures."""
    return tensor.reshape(*tensor.shape[: tensor.ndim - axes], *[structure.dim for structure in structures])


def unfold_means(
    groups: Groups,
    structures: Sequence[Structure],
    outers: Sequence[Parts],
    matrices: Sequence[Parts] | None = None,
    *,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Parts, ...]:
    """Returns for each axis what a mean over its group's other axes leaves of the group's matrix.

    Args:
      groups: the folded axes.
      structures: of the axes before folding.
      outers: the parts for each folded axis, X Xᵀ over the other folded axes' lengths.
      matrices: the parts of each Kₘ, where X was not multiplied by the transposes of its own group's: the mean over an
        axis m of the group is tr(X Xᵀ KₘKₘᵀ)/dₘ then. None: X was multiplied by them.
      precision: of the products KₘKₘᵀ.
    """
    means: list[Parts] = []
    for group, parts in zip(groups, outers, strict=True):
        own, weights = [structures[n] for n in group], None
        if matrices is not None and len(group) > 1:
            weights = [structures[n].square(matrices[n], precision=precision)[0] for n in group]
        means += [parts if len(group) == 1 else _partial_mean(parts[0], own, i, weights) for i in range(len(group))]
    return tuple(means)


def group_axes(structures: Sequence[Structure], dtypes: Sequence[jnp.dtype]) -> Groups:
    """Returns which axes `fold` makes one, given the dtypes of their matrices."""
    size = math.prod([structure.dim for structure in structures])
    groups: list[tuple[int, ...]] = []
    for axis, dtype in enumerate(dtypes):
        group = (*groups[-1], axis) if groups else (axis,)
        length = math.prod([structures[n].dim for n in group])
        are_alike = {(structures[n].is_dense, dtypes[n]) for n in group} == {(True, dtype)}
        is_short = length <= _LONGEST and length**3 <= size
        if len(group) > 1 and is_short and are_alike and not has_smaller_range(dtype, accumulation_dtype(dtype)):
            groups[-1] = group
        else:
            groups.append((axis,))
    return tuple(groups)


def _partial_mean(
    matrix: jax.Array, structures: Sequence[Structure], index: int, weights: Sequence[jax.Array] | None
) -> Parts:
    """Returns the parts of the mean over all axes but one of a matrix [Π lengths, Π lengths].

    It is over equal indices of an axis, or over all pairs of them with the axis's weights.
    """
    lengths = [structure.dim for structure in structures]
    rows = list(range(len(lengths)))
    columns = [len(lengths) + n if n == index or weights is not None else n for n in rows]
    operands: list[Any] = [matrix.reshape(*lengths, *lengths), [*rows, *columns]]
    for n, weight in enumerate(weights or ()):
        if n != index:
            operands += [weight.reshape(lengths[n], lengths[n]), [rows[n], columns[n]]]
    mean = jnp.einsum(*operands, [index, len(lengths) + index]) / (math.prod(lengths) // lengths[index])
    # A matrix of an axis of length one is a diagonal's, with one axis, here as in the weights.
    return (mean.reshape(structures[index].part_shapes[0]),)


def apply_transposes(
    tensor: jax.Array,
    matrices: Sequence[Parts],
    *,
    structures: Sequence[Structure],
    axes: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns a tensor multiplied along every axis n by Kₙᵀ.

    Args:
      tensor: [d₁, …, d_N], or [samples, d₁, …, d_N].
      matrices: the parts of each Kₙ.
      structures: the structure of each Kₙ.
      axes: those to multiply along, from zero, samples not counted. None: all.
      precision: of every product.

    Returns:
      The product, in the accumulation dtype, or the tensor itself if there is nothing to multiply by.
    """
    samples = tensor.ndim - len(structures)
    for axis in range(len(structures)) if axes is None else axes:
        tensor = structures[axis].apply(matrices[axis], tensor, samples + axis, transposed=True, precision=precision)
    return tensor


def apply_other_transposes(
    tensor: jax.Array,
    matrices: Sequence[Parts],
    *,
    structures: Sequence[Structure],
    precision: jax.lax.PrecisionLike = None,
) -> list[jax.Array]:
    """Returns for each axis n the tensor multiplied along every other axis m by Kₘᵀ.

    The axes are divided in two, again and again, and each half is given the other's products, which its axes share. So
    N axes take about N·log₂N products in place of N·(N − 1), and the longest fewest.

    Args:
      tensor: [d₁, …, d_N], or [samples, d₁, …, d_N].
      matrices: the parts of each Kₙ.
      structures: the structure of each Kₙ.
      precision: of every product.
    """
    divisions = _divide_axes(structures)
    if not divisions:
        return [tensor]
    products = {divisions[0].whole: tensor}
    for whole, half, others in divisions:
        shared = products[whole]
        products[half] = apply_transposes(shared, matrices, structures=structures, axes=others, precision=precision)
    return [products[axis,] for axis in range(len(structures))]


def count_other_transposes(structures: Sequence[Structure]) -> list[int]:
    """Returns along each axis how many products `apply_other_transposes` takes."""
    divisions = _divide_axes(structures)
    return [sum([axis in division.others for division in divisions]) for axis in range(len(structures))]


class _Division(NamedTuple):
    """Some axes, one half of them, and the other half."""

    whole: tuple[int, ...]
    half: tuple[int, ...]
    others: tuple[int, ...]


def _divide_axes(structures: Sequence[Structure]) -> list[_Division]:
    """Returns in order how all axes are divided, down to single ones: the short from the long."""
    lengths = [structure.dim for structure in structures]
    # Of equal lengths the last count as the shortest: along the last axis, as it lies in memory, products are fastest.
    pending, divisions = [tuple(sorted(range(len(lengths) - 1, -1, -1), key=lengths.__getitem__))], []
    while pending:
        whole = pending.pop()
        short, long = whole[: -(-len(whole) // 2)], whole[-(-len(whole) // 2) :]
        if long:
            divisions += [_Division(whole, short, long), _Division(whole, long, short)]
            pending += [short, long]
    return divisions


def apply_factors(
    tensor: jax.Array,
    matrices: Sequence[Parts],
    *,
    structures: Sequence[Structure],
    transposed_first: bool,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns a tensor multiplied along every axis n by KₙKₙᵀ, or by Kₙ alone.

    Where the matrices' dtype has a smaller range than the accumulation dtype (float16), each matrix enters divided by a
    power of two near its largest entry, and so do the tensor and the products on the way; the result is scaled back. So
    no intermediate leaves that range before the result itself does. Elsewhere this would be two passes over the factors
    without any use: `balance` keeps the factors so close that an intermediate overflows only where the result does.

    Args:
      tensor: [d₁, …, d_N]. A non-finite entry makes the same entry of the result non-finite.
      matrices: the parts of each matrix.
      structures: the structure of each matrix.
      transposed_first: whether each axis is multiplied by Kᵀ and then by K, rather than by K alone.
      precision: of every product.

    Returns:
      The product, [d₁, …, d_N], in the accumulation dtype.
    """
    folded = fold(structures, matrices)
    result = fold_axes(upcast(tensor), len(structures), folded.structures)
    rescale = jnp.ones((), result.dtype)
    for axis, (structure, parts) in enumerate(zip(folded.structures, folded.matrices, strict=True)):
        if has_smaller_range(parts[0].dtype, result.dtype):
            scale = power_of_two(exponent_of(max_abs(parts))).astype(rescale.dtype)
            unit = power_of_two(exponent_of(jnp.max(jnp.abs(result)))).astype(rescale.dtype)
            result, parts = result / unit, times_scalar(parts, 1 / scale)
            rescale = rescale * unit * scale ** (1 + transposed_first)
        if transposed_first:
            result = structure.apply(parts, result, axis, transposed=True, precision=precision)
        result = structure.apply(parts, result, axis, precision=precision)
    return (result * rescale).reshape(tensor.shape)

"""How the factors of ONE block apply to a tensor, short axes folded.

A product along a short axis has little to compute: what it costs is one pass over the tensor. Along two of them, such
as a convolution's 3×3, it costs one pass, too, by the Kronecker product of their matrices: K₁ ⊗ K₂ along the folded
axis of length d₁d₂.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

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

    def folded(group: tuple[int, ...]) -> tuple[Structure, Parts]:
        if len(group) == 1:
            return structures[group[0]], matrices[group[0]]
        kronecker = functools.reduce(jnp.kron, [matrices[n][0] for n in group])
        return dense(len(kronecker)), (kronecker,)

    groups = _groups(structures, [parts[0].dtype for parts in matrices])
    new_structures, new_matrices = zip(*map(folded, groups), strict=True)
    return Folded(groups, new_structures, new_matrices)


def fold_axes(tensor: jax.Array, axes: int, structures: Sequence[Structure]) -> jax.Array:
    """Returns a tensor [d₁, …, d_N] or [samples, d₁, …, d_N], of N = `axes`, with the axes of the folded structures."""
    return tensor.reshape(*tensor.shape[: tensor.ndim - axes], *[structure.dim for structure in structures])


def unfold_means(groups: Groups, structures: Sequence[Structure], outers: Sequence[Parts]) -> tuple[Parts, ...]:
    """Returns for each axis what a mean over its group's other axes leaves of the group's matrix.

    Args:
      groups: the folded axes.
      structures: of the axes before folding.
      outers: the parts for each folded axis, X Xᵀ over the other folded axes' lengths.
    """
    return tuple(
        parts if len(group) == 1 else _partial_mean(parts[0], [structures[n] for n in group], index)
        for group, parts in zip(groups, outers, strict=True)
        for index in range(len(group))
    )


def _groups(structures: Sequence[Structure], dtypes: Sequence[jnp.dtype]) -> Groups:
    size = math.prod([structure.dim for structure in structures])

    def fits(group: tuple[int, ...]) -> bool:
        length = math.prod([structures[n].dim for n in group])
        one_dtype = len({dtypes[n] for n in group}) == 1
        is_narrow = has_smaller_range(dtypes[group[0]], accumulation_dtype(dtypes[group[0]]))
        are_dense = {structures[n].is_dense for n in group} == {True}
        return are_dense and one_dtype and not is_narrow and length <= _LONGEST and length**3 <= size

    groups: list[tuple[int, ...]] = []
    for axis in range(len(structures)):
        if groups and fits((*groups[-1], axis)):
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return tuple(groups)


def _partial_mean(matrix: jax.Array, structures: Sequence[Structure], index: int) -> Parts:
    """Returns the parts of the mean over equal indices of all axes but one of a matrix [Π lengths, Π lengths]."""
    lengths = [structure.dim for structure in structures]
    rows = list(range(len(lengths)))
    columns = [len(lengths) if n == index else n for n in rows]
    others = math.prod(lengths) // lengths[index]
    mean = jnp.einsum(matrix.reshape(*lengths, *lengths), [*rows, *columns], [index, len(lengths)]) / others
    return (mean.reshape(structures[index].part_shapes[0]),)  # of an axis of length one, a diagonal's


def apply_transposes(
    tensor: jax.Array,
    matrices: Sequence[Parts],
    *,
    structures: Sequence[Structure],
    but: int | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Returns a tensor multiplied along every axis n by Kₙᵀ.

    Args:
      tensor: [d₁, …, d_N], or [samples, d₁, …, d_N].
      matrices: the parts of each Kₙ.
      structures: the structure of each Kₙ.
      but: an axis to leave as it is, from zero, samples not counted. None leaves none.
      precision: of every product.

    Returns:
      The product, in the accumulation dtype, or the tensor itself if there is nothing to multiply by.
    """
    samples = tensor.ndim - len(structures)
    for axis, (structure, parts) in enumerate(zip(structures, matrices, strict=True)):
        if axis != but:
            tensor = structure.apply(parts, tensor, samples + axis, transposed=True, precision=precision)
    return tensor


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

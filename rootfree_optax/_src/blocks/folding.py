"""Short neighbouring axes of a block as one axis, such as the two of a convolution's 3×3 kernel.

A product along a short axis has little to compute: what it costs is one pass over the tensor. Along two of them it
costs one pass, too, by the Kronecker product of their matrices: K₁ ⊗ K₂ along the folded axis of length d₁d₂.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rootfree_optax._src.numerics.dtypes import accumulation_dtype
from rootfree_optax._src.structures import dense
from rootfree_optax._src.structures.base import Parts, Structure

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
        kronecker = functools.reduce(jnp.kron, (matrices[n][0] for n in group))
        return dense(len(kronecker)), (kronecker,)

    groups = _groups(structures, [parts[0].dtype for parts in matrices])
    new_structures, new_matrices = zip(*map(folded, groups), strict=True)
    return Folded(groups, new_structures, new_matrices)


def fold_axes(tensor: jax.Array, axes: int, structures: Sequence[Structure]) -> jax.Array:
    """Returns a tensor [d₁, …, d_N] or [samples, d₁, …, d_N], of N = `axes`, with the axes of the folded structures."""
    return tensor.reshape(*tensor.shape[: tensor.ndim - axes], *(structure.dim for structure in structures))


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
    size = math.prod(structure.dim for structure in structures)

    def fits(group: tuple[int, ...]) -> bool:
        length = math.prod(structures[n].dim for n in group)
        one_dtype = len({dtypes[n] for n in group}) == 1
        wide = jnp.finfo(dtypes[group[0]]).maxexp >= jnp.finfo(accumulation_dtype(dtypes[group[0]])).maxexp
        are_dense = all(structures[n].is_dense for n in group)
        return are_dense and one_dtype and wide and length <= _LONGEST and length**3 <= size

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

"""One diagonal block of a block pattern, and products along one axis of a tensor."""

import dataclasses
import string

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax.precision import upcast


def _einsum(subscripts: str, *operands: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Returns an einsum accumulated, and returned, in the operands' accumulation dtype."""
    wide = tuple(map(upcast, operands))
    if operands[0].dtype != jnp.bfloat16:
        return jnp.einsum(subscripts, *wide, precision=precision)
    # XLA for CPUs fails at run time on some products of bfloat16 arrays. So the arrays are given in float32, which
    # holds them exactly, and accelerators have leave to multiply them in bfloat16 units, which is exact, too.
    units = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return jax.lax.platform_dependent(
        *wide,
        cpu=lambda *arrays: jnp.einsum(subscripts, *arrays),
        default=lambda *arrays: jnp.einsum(subscripts, *arrays, precision=units),
    )


def einsum_along(
    subscripts: str, axis: int, ndim: int, *operands: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """Returns an einsum in capital letters, with '<' and '>' for the tensors' axes before and after `axis`."""
    others = string.ascii_lowercase[: ndim - 1]
    operand_axes, result_axes = (
        axes.replace("<", others[:axis]).replace(">", others[axis:]) for axes in subscripts.split("->")
    )
    return _einsum(f"{operand_axes}->{result_axes}", *operands, precision=precision)


def apply_matrix(matrix: jax.Array, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Returns `tensor` multiplied along `axis` by a matrix [rows, columns]."""
    return einsum_along("IJ,<J>-><I>", axis, tensor.ndim, matrix, tensor, precision=precision)


def transpose(block: jax.Array) -> jax.Array:
    """Returns what holds the transposed block; a diagonal is its own transpose."""
    return block if block.ndim == 1 else jnp.matrix_transpose(block)


def _other_axes(tensor: jax.Array, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(tensor.ndim) if other != axis)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive indices with `count` dense blocks of `size` rows on the diagonal.

    The matrix is held in one part: [size, size] for one block, [count] for blocks of size one (a diagonal), and
    [count, size, size] otherwise.

    Args:
      count: the number of blocks.
      size: the rows of each block.
    """

    count: int
    size: int

    @property
    def dim(self) -> int:
        """The number of indices."""
        return self.count * self.size

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        return (self.count,) if self.size == 1 else (*self._axis_shape, self.size)

    def identity(self, dtype: DTypeLike) -> jax.Array:
        """Returns the part of I."""
        block = jnp.ones((), dtype) if self.size == 1 else jnp.eye(self.size, dtype=dtype)
        return jnp.broadcast_to(block, self.part_shape)

    def to_dense(self, part: jax.Array) -> jax.Array:
        """Returns the matrix, [dim, dim]."""
        blocks = part.reshape(self.count, self.size, self.size)
        return jnp.einsum("nij,nm->nimj", blocks, jnp.eye(self.count, dtype=part.dtype)).reshape(self.dim, self.dim)

    def matmul(self, left: jax.Array, right: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
        """Returns the part of L R."""
        if self.size == 1:
            return upcast(left) * upcast(right)
        return _einsum("...ij,...jk->...ik", left, right, precision=precision)

    def apply(self, part: jax.Array, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike) -> jax.Array:
        """Returns `tensor` multiplied along `axis`."""
        if self.size == 1:
            return jnp.expand_dims(upcast(part), _other_axes(tensor, axis)) * upcast(tensor)
        if self.count == 1:
            return apply_matrix(part, tensor, axis, precision=precision)
        blocks = self._split_axis(tensor, axis)
        out = einsum_along("NIJ,<NJ>-><NI>", axis, tensor.ndim, part, blocks, precision=precision)
        return out.reshape(tensor.shape)

    def project_outer(self, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike) -> jax.Array:
        """Returns the part of X Xᵀ, X being the unfolding of `tensor` along `axis`."""
        if self.size == 1:
            return jnp.sum(jnp.square(upcast(tensor)), axis=_other_axes(tensor, axis))
        subscripts = "<I>,<J>->IJ" if self.count == 1 else "<NI>,<NJ>->NIJ"
        blocks = self._split_axis(tensor, axis)
        return einsum_along(subscripts, axis, tensor.ndim, blocks, blocks, precision=precision)

    @property
    def _axis_shape(self) -> tuple[int, ...]:
        return (self.size,) if self.count == 1 else (self.count, self.size)

    def _split_axis(self, tensor: jax.Array, axis: int) -> jax.Array:
        return tensor.reshape(*tensor.shape[:axis], *self._axis_shape, *tensor.shape[axis + 1 :])

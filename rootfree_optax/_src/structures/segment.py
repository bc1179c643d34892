"""One diagonal block of a block pattern, and products along one axis of a tensor."""

import dataclasses
import string

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.numerics import inverse_root
from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.products import einsum


def einsum_along(
    subscripts: str, axis: int, ndim: int, *operands: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """Returns an einsum in capital letters, with '<' and '>' for the tensors' axes before and after `axis`."""
    others = string.ascii_lowercase[: ndim - 1]
    operand_axes, result_axes = (
        axes.replace("<", others[:axis]).replace(">", others[axis:]) for axes in subscripts.split("->")
    )
    return einsum(f"{operand_axes}->{result_axes}", *operands, precision=precision)


def apply_matrix(
    matrix: jax.Array, tensor: jax.Array, axis: int, *, transposed: bool = False, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """Returns `tensor` multiplied along `axis` by a matrix [rows, columns], or by its transpose."""
    subscripts = "JI,<J>-><I>" if transposed else "IJ,<J>-><I>"
    return einsum_along(subscripts, axis, tensor.ndim, matrix, tensor, precision=precision)


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
        return self._product("...ij,...jk->...ik", left, right, precision=precision)

    def inner(self, part: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
        """Returns the part of Kᵀ K."""
        return self._product("...ji,...jk->...ik", part, part, precision=precision)

    def square(self, part: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
        """Returns the part of K Kᵀ."""
        return self._product("...ij,...kj->...ik", part, part, precision=precision)

    def _product(
        self, subscripts: str, left: jax.Array, right: jax.Array, *, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        if self.size == 1:
            return upcast(left) * upcast(right)
        # A transposed block is named so: XLA for CPUs copies one that is transposed first.
        return einsum(subscripts, left, right, precision=precision)

    def times_inverse_root(
        self, part: jax.Array, excess: jax.Array, *, shift: ArrayLike, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        """Returns the part of K (a·I + E)^(−1/2)."""
        if self.size == 1:
            return inverse_root.elementwise(part, excess, shift=shift)
        return inverse_root.times_inverse_root(part, excess, shift=shift, precision=precision)

    def apply(
        self,
        part: jax.Array,
        tensor: jax.Array,
        axis: int,
        *,
        transposed: bool = False,
        precision: jax.lax.PrecisionLike,
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by the matrix, or by its transpose."""
        if self.size == 1:
            return jnp.expand_dims(upcast(part), _other_axes(tensor, axis)) * upcast(tensor)
        if self.count == 1:
            return apply_matrix(part, tensor, axis, transposed=transposed, precision=precision)
        blocks = self._split_axis(tensor, axis)
        subscripts = "NJI,<NJ>-><NI>" if transposed else "NIJ,<NJ>-><NI>"
        out = einsum_along(subscripts, axis, tensor.ndim, part, blocks, precision=precision)
        return out.reshape(tensor.shape)

    def project_outer(self, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike) -> jax.Array:
        """Returns the part of X Xᵀ, X being the unfolding of `tensor` along `axis`."""
        if self.size == 1:
            return jnp.sum(jnp.square(upcast(tensor)), axis=_other_axes(tensor, axis))
        subscripts = "<I>,<J>->IJ" if self.count == 1 else "<NI>,<NJ>->NIJ"
        blocks = self._split_axis(tensor, axis)
        return einsum_along(subscripts, axis, tensor.ndim, blocks, blocks, precision=precision)

    def project_product(self, left: jax.Array, right: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
        """Returns the part of Lᵀ R for matrices [rows, dim]."""
        if self.size == 1:
            return jnp.sum(upcast(left) * upcast(right), axis=0)
        blocks = (self._split_axis(matrix, 1) for matrix in (left, right))
        subscripts = "<I>,<J>->IJ" if self.count == 1 else "<NI>,<NJ>->NIJ"
        return einsum_along(subscripts, 1, 2, *blocks, precision=precision)

    @property
    def _axis_shape(self) -> tuple[int, ...]:
        return (self.size,) if self.count == 1 else (self.count, self.size)

    def _split_axis(self, tensor: jax.Array, axis: int) -> jax.Array:
        return tensor.reshape(*tensor.shape[:axis], *self._axis_shape, *tensor.shape[axis + 1 :])

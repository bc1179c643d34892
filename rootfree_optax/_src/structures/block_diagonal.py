"""Block-diagonal matrices with blocks of one size, which include the dense and the diagonal matrices."""

import dataclasses
import string

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.numerics import inverse_root, polar
from rootfree_optax._src.numerics.arithmetic import einsum, upcast
from rootfree_optax._src.structures.base import Flops, Parts, Structure, other_axes


def subscripts_along(subscripts: str, axis: int, ndim: int) -> str:
    """Returns subscripts in capital letters with the axes of a tensor before `axis` for "(" and after it for ")"."""
    others = string.ascii_lowercase[: ndim - 1]
    return subscripts.replace("(", others[:axis]).replace(")", others[axis:])


def multiply_along(
    part: jax.Array, tensor: jax.Array, axis: int, *, transposed: bool = False, precision: PrecisionLike
) -> jax.Array:
    """Returns `tensor` multiplied along `axis` by a matrix, or by its transpose, in the accumulation dtype.

    Args:
      part: the matrix: all of it [rows, columns], its diagonal [d], or the blocks on its diagonal [count, size, size].
      tensor: any shape, of a matching length along `axis`.
      axis: from zero.
      transposed: whether to multiply by the transpose.
      precision: of the product.
    """
    if part.ndim == 1:
        return jnp.expand_dims(upcast(part), other_axes(tensor, axis)) * upcast(tensor)
    if part.ndim == 2:
        subscripts = subscripts_along("JI,(J)->(I)" if transposed else "IJ,(J)->(I)", axis, tensor.ndim)
        return einsum(subscripts, part, tensor, precision=precision)
    subscripts = subscripts_along("NJI,(NJ)->(NI)" if transposed else "NIJ,(NJ)->(NI)", axis, tensor.ndim)
    blocks = tensor.reshape(*tensor.shape[:axis], *part.shape[:2], *tensor.shape[axis + 1 :])
    return einsum(subscripts, part, blocks, precision=precision).reshape(tensor.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BlockDiagonal(Structure):
    """Matrices with `count` dense blocks of `size` rows on the diagonal, and zero elsewhere.

    The one part is [size, size] for one block, [count] for blocks of size one (a diagonal), and [count, size, size]
    otherwise.

    Args:
      count: the number of blocks, at least one.
      size: the rows of each block, at least one.

    Raises:
      ValueError: if either is below one.

    Example:
      >>> BlockDiagonal(count=3, size=30).part_shapes
      ((3, 30, 30),)
    """

    count: int
    size: int
    is_symmetric = True

    @property
    def dim(self) -> int:
        return self.count * self.size

    @property
    def name(self) -> str:
        return "diagonal" if self.size == 1 else "dense" if self.count == 1 else f"block{self.size}diagonal"

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        count, size = self.count, self.size
        return ((count,) if size == 1 else (size, size) if count == 1 else (count, size, size),)

    @property
    def is_dense(self) -> bool:
        return self.count == 1

    @property
    def is_diagonal(self) -> bool:
        return self.size == 1

    def identity(self, dtype: DTypeLike) -> Parts:
        block = jnp.ones((), dtype) if self.size == 1 else jnp.eye(self.size, dtype=dtype)
        return (jnp.broadcast_to(block, self.part_shapes[0]),)

    def to_dense(self, parts: Parts) -> jax.Array:
        blocks = parts[0].reshape(self.count, self.size, self.size)
        return jnp.einsum("nij,nm->nimj", blocks, jnp.eye(self.count, dtype=blocks.dtype)).reshape(self.dim, self.dim)

    def matmul(self, left: Parts, right: Parts, *, precision: PrecisionLike = None) -> Parts:
        return self._product("...ij,...jk->...ik", left, right, precision)

    def square(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        return self._product("...ij,...kj->...ik", parts, parts, precision)

    def symmetric_root(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        if self.size == 1:
            return (jnp.abs(upcast(parts[0])),)
        return (polar.symmetric_root(parts[0], precision=precision),)

    def positive_root(self, parts: Parts, least: ArrayLike, *, precision: PrecisionLike = None) -> Parts:
        if self.size == 1:
            return (jnp.sqrt(upcast(parts[0])),)
        return (polar.positive_root(parts[0], least, precision=precision),)

    def project_inner(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        return self._product("...ji,...jk->...ik", parts, parts, precision)

    def _product(self, subscripts: str, left: Parts, right: Parts, precision: PrecisionLike) -> Parts:
        if self.size == 1:
            return (upcast(left[0]) * upcast(right[0]),)
        # The subscripts say which block is transposed: XLA for CPUs copies a block that is transposed first.
        return (einsum(subscripts, left[0], right[0], precision=precision),)

    def congruence(self, parts: Parts, symmetric: Parts) -> Parts:
        # K makes errors of S as many times as large as S⁻¹ is there, so that S keeps all its bits.
        wide, highest = (upcast(parts[0]),), jax.lax.Precision.HIGHEST
        return self._product("...ji,...jk->...ik", wide, self.matmul(symmetric, wide, precision=highest), highest)

    def trace(self, parts: Parts) -> jax.Array:
        """Returns Tr(K)."""
        return jnp.sum(parts[0]) if self.size == 1 else jnp.sum(jnp.trace(parts[0], axis1=-2, axis2=-1))

    def times_inverse_root(
        self, parts: Parts, excess: Parts, *, shift: ArrayLike, precision: PrecisionLike = None
    ) -> Parts:
        """Returns the parts of K (a·I + E)^(−1/2)."""
        if self.size == 1:
            return (inverse_root.elementwise(parts[0], excess[0], shift=shift),)
        return (inverse_root.times_inverse_root(parts[0], excess[0], shift=shift, precision=precision),)

    def apply(
        self, parts: Parts, tensor: jax.Array, axis: int, *, transposed: bool = False, precision: PrecisionLike = None
    ) -> jax.Array:
        tensor = tensor.astype(parts[0].dtype)
        return multiply_along(parts[0], tensor, axis, transposed=transposed, precision=precision)

    def project_outer(self, tensor: jax.Array, axis: int, *, precision: PrecisionLike = None) -> Parts:
        if self.size == 1:
            return (jnp.sum(jnp.square(upcast(tensor)), axis=other_axes(tensor, axis)),)
        subscripts = subscripts_along("(I),(J)->IJ" if self.count == 1 else "(NI),(NJ)->NIJ", axis, tensor.ndim)
        blocks = tensor.reshape(*tensor.shape[:axis], *self.part_shapes[0][:-1], *tensor.shape[axis + 1 :])
        return (einsum(subscripts, blocks, blocks, precision=precision),)

    def squared_norm(self, parts: Parts) -> jax.Array:
        """Returns ‖K‖²_F, the sum of the squares of all entries."""
        return jnp.sum(jnp.square(upcast(parts[0])))

    def flops(self, columns: int) -> Flops:
        applied, product = 2 * self.size * self.dim * columns, 2 * self.size * self.dim * self.size
        return Flops(apply=applied, project_outer=applied, matmul=product, project_inner=product)

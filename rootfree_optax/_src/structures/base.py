"""Structures: sets of d×d matrices closed under linear combination and product, with a projection onto each.

A `Structure` is static data (sizes only). A matrix in it is its `Parts`: a tuple of arrays that hold the numbers of the
matrix and nothing else. A linear combination of matrices is the same combination of their parts (`jax.tree.map`). All
else that the refresh and the application of a preconditioner need is an operation below, for one matrix; `jax.vmap` it
for stacks. Every operation is out of place. It accumulates in the `accumulation_dtype` of the parts, which is the dtype
of its result.

The structures and their projections are from Lin et al., Structured Inverse-Free Natural Gradient Descent (2023,
https://arxiv.org/abs/2312.05705).
"""

import abc
import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import ArrayLike, DTypeLike

Parts: TypeAlias = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Flops:
    """The floating-point operations, with a multiply-add as two, of a structure's operations."""

    apply: int
    project_outer: int
    matmul: int
    project_inner: int


def times_scalar(parts: Parts, factor: ArrayLike) -> Parts:
    """Returns the parts times a scalar."""
    return tuple([part * jnp.asarray(factor, part.dtype) for part in parts])


class Structure(abc.ABC):
    """A set of d×d matrices closed under linear combination and product. Hashable; equal if the sets are equal.

    Throughout, `axis` counts from zero, a `tensor` has length d along it and is cast to the dtype of the parts, and
    the parts given to one operation have one dtype.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> plan = rf.Layout(structure="block30diagonal").plan(jnp.zeros((90, 60)))
      >>> plan.stacks[0].structures
      (block30diagonal(90), block30diagonal(60))
    """

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """The number of rows, d, at least one."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name, for tables."""

    @property
    @abc.abstractmethod
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the parts."""

    @property
    def is_dense(self) -> bool:
        """Whether the set has all d×d matrices, with one part [d, d] for d > 1."""
        return False

    @property
    def is_diagonal(self) -> bool:
        """Whether the set has the diagonal matrices alone, with one part [d]."""
        return False

    @property
    def is_symmetric(self) -> bool:
        """Whether the set has the transpose of each of its matrices, and so K Kᵀ and the roots of such products."""
        return False

    @abc.abstractmethod
    def identity(self, dtype: DTypeLike) -> Parts:
        """Returns the parts of I, of `dtype`."""

    def zeros(self, dtype: DTypeLike) -> Parts:
        """Returns the parts of the zero matrix, of `dtype`."""
        return tuple([jnp.zeros(shape, dtype) for shape in self.part_shapes])

    @abc.abstractmethod
    def to_dense(self, parts: Parts) -> jax.Array:
        """Returns the matrix, [d, d], in the parts' dtype. For readers and tests: no optimizer calls it in a step."""

    @abc.abstractmethod
    def matmul(self, left: Parts, right: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of L R."""

    def square(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of K Kᵀ, if the set is symmetric.

        Raises:
          ValueError: if the set is not symmetric.
        """
        raise self.not_symmetric()

    def symmetric_root(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of (K Kᵀ)^(1/2), which is symmetric positive semidefinite, if the set is symmetric.

        Raises:
          ValueError: if the set is not symmetric.
        """
        raise self.not_symmetric()

    def positive_root(self, parts: Parts, least: ArrayLike, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of M^(1/2) for symmetric M without eigenvalues below `least`, if the set is symmetric.

        Raises:
          ValueError: if the set is not symmetric.
        """
        raise self.not_symmetric()

    def congruence(self, parts: Parts, symmetric: Parts) -> Parts:
        """Returns the parts of Kᵀ S K for a symmetric S in the accumulation dtype, at the highest precision.

        Raises:
          ValueError: if the set is not symmetric.
        """
        raise self.not_symmetric()

    def times_inverse_root(
        self, parts: Parts, excess: Parts, *, shift: ArrayLike, precision: PrecisionLike = None
    ) -> Parts:
        """Returns the parts of K (a·I + E)^(−1/2), if the set is symmetric.

        Args:
          parts: of K.
          excess: of E, symmetric positive semidefinite, in the accumulation dtype.
          shift: a > 0, a scalar.
          precision: of every product.

        Raises:
          ValueError: if the set is not symmetric.
        """
        raise self.not_symmetric()

    @abc.abstractmethod
    def apply(
        self, parts: Parts, tensor: jax.Array, axis: int, *, transposed: bool = False, precision: PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by K, or by Kᵀ: out[…, i, …] = Σⱼ K[i, j] tensor[…, j, …]."""

    @abc.abstractmethod
    def project_outer(self, tensor: jax.Array, axis: int, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(X Xᵀ), where X [d, …] is the unfolding of `tensor` along `axis`."""

    @abc.abstractmethod
    def project_inner(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(Kᵀ K)."""

    def add_identity(self, parts: Parts, scale: ArrayLike) -> Parts:
        """Returns the parts of K + c·I; of a dense or diagonal K + diag(c) for a vector c."""
        identity = self.identity(parts[0].dtype)
        scales = [jnp.broadcast_to(jnp.asarray(scale, k.dtype), k.shape) for k in parts]
        return tuple([k + c * i for k, c, i in zip(parts, scales, identity, strict=True)])

    @abc.abstractmethod
    def squared_norm(self, parts: Parts) -> jax.Array:
        """Returns ‖K‖²_F = Tr(KᵀK), a scalar."""

    def trace(self, parts: Parts) -> jax.Array:
        """Returns Tr(K), a scalar, if the set is symmetric.

        Raises:
          ValueError: if the set is not symmetric.
        """
        raise self.not_symmetric()

    @abc.abstractmethod
    def flops(self, columns: int) -> Flops:
        """Returns the cost of the operations, for a tensor of d × `columns` entries."""

    def not_symmetric(self) -> ValueError:
        """Returns the error of an operation whose result is in symmetric sets alone."""
        return ValueError(f"this needs a structure that is closed under transposition, got {self.name!r}.")

    def __repr__(self) -> str:
        return f"{self.name}({self.dim})"


def other_axes(tensor: jax.Array, axis: int) -> tuple[int, ...]:
    """Returns all axes of `tensor` but `axis`."""
    return (*range(axis), *range(axis + 1, tensor.ndim))

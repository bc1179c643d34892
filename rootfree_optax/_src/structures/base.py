"""What a structure is: a set of d×d matrices closed under linear combination and product, with a projection onto it.

A `Structure` is static data (sizes only). A matrix in it is its `Parts`: a tuple of arrays that hold its numbers and
nothing else. Linear combinations are linear combinations of the parts (`jax.tree.map`); everything else that the
refresh and the application of a preconditioner need is an operation below, for one matrix. Stacks are `jax.vmap`ped.
Every operation is out of place, accumulates in `precision.accumulation_dtype`, and returns that dtype too.
"""

import abc
import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

Parts: TypeAlias = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply-add counting as two, of a structure's operations."""

    apply: int
    project_outer: int
    matmul: int
    project_inner: int


def times_scalar(parts: Parts, factor: ArrayLike) -> Parts:
    """Returns the parts times a scalar."""
    return tuple(part * jnp.asarray(factor, part.dtype) for part in parts)


class Structure(abc.ABC):
    """A set of d×d matrices closed under linear combination and product. Hashable; equal where the sets are.

    Throughout, `axis` counts from zero, a `tensor` has length d along it and is cast to the dtype of the parts, and
    the parts given to one operation have one dtype.
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

    @abc.abstractmethod
    def identity(self, dtype: DTypeLike) -> Parts:
        """Returns the parts of I, of `dtype`."""

    @abc.abstractmethod
    def to_dense(self, parts: Parts) -> jax.Array:
        """Returns the matrix, [d, d], in the parts' dtype. For readers and tests: no step of an optimizer calls it."""

    @abc.abstractmethod
    def matmul(self, left: Parts, right: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of L R."""

    @abc.abstractmethod
    def apply(
        self, parts: Parts, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis`, of length d, by K: out[…, i, …] = Σⱼ K[i, j] tensor[…, j, …]."""

    @abc.abstractmethod
    def apply_transposed(
        self, parts: Parts, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis`, of length d, by Kᵀ."""

    @abc.abstractmethod
    def project_outer(self, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(X Xᵀ), X [d, …] being the unfolding of `tensor` along `axis`."""

    @abc.abstractmethod
    def project_inner(self, parts: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(Kᵀ K)."""

    @abc.abstractmethod
    def squared_norm(self, parts: Parts) -> jax.Array:
        """Returns ‖K‖²_F = Tr(KᵀK), a scalar."""

    @abc.abstractmethod
    def flops(self, columns: int) -> Flops:
        """Returns what the operations cost, on a tensor of d × `columns` entries."""

    @property
    def is_symmetric(self) -> bool:
        """Whether the set has every matrix's transpose, and with it K Kᵀ and the roots of such products."""
        return False

    def square(self, parts: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of K Kᵀ, in the accumulation dtype, if the set is symmetric.

        Raises:
          ValueError: if the set is not symmetric.
        """
        del parts, precision
        raise ValueError(f"K Kᵀ needs a structure that is closed under transposition, got {self.name!r}.")

    @property
    def has_inverse_root(self) -> bool:
        """Whether `times_inverse_root` exists: its closed form takes no more of a matrix than Π̂ of it."""
        return self.is_symmetric

    def times_inverse_root(
        self, parts: Parts, excess: Parts, *, shift: ArrayLike, precision: jax.lax.PrecisionLike = None
    ) -> Parts:
        """Returns the parts of K C, in the accumulation dtype, C being the set's inverse root of M = a·I + E.

        That is the one with the least Tr(CᵀMC) − 2 log|det C|. Where the set is symmetric and M is in it, C = M^(−1/2).

        Args:
          parts: of K.
          excess: the parts of Π̂(E), E symmetric positive semidefinite, in the accumulation dtype.
          shift: a > 0, a scalar.
          precision: of every product.

        Raises:
          ValueError: if the set has no inverse root in closed form.
        """
        del parts, excess, shift, precision
        raise ValueError(f"an inverse root in closed form needs another structure than {self.name!r}.")

    def zeros(self, dtype: DTypeLike) -> Parts:
        """Returns the parts of the zero matrix, of `dtype`."""
        return tuple(jnp.zeros(shape, dtype) for shape in self.part_shapes)

    def __repr__(self) -> str:
        return f"{self.name}({self.dim})"

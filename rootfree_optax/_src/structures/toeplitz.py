"""Triangular Toeplitz matrices: constant along each diagonal, so that a product is a convolution.

A matrix is held in one part [d]: the entry of the main diagonal, then those of the diagonals below it (lower) or
above it (upper). The two kinds are each other's transposes, products commute, and Kᵀ K and K Kᵀ have equal sums along
their diagonals. So every operation but `apply`, `apply_transposed` and `to_dense` is the same for both.

XLA partitions no Fourier transform: of a stack sharded over devices, it gathers the whole to each of them. Inside
`jax.shard_map` the transforms stay local.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.structures.base import Flops, Parts, Structure


@dataclasses.dataclass(frozen=True, repr=False)
class TriangularToeplitz(Structure):
    """Lower- or upper-triangular Toeplitz matrices.

    Products are computed by fast Fourier transforms, in at least float32: their errors are relative to the largest
    entry, not to each.

    Args:
      size: the number of rows, d, at least one.
      lower: whether the entries above the diagonal are zero, rather than those below.

    Raises:
      ValueError: if `size` is below one.

    Example:
      >>> import jax.numpy as jnp
      >>> TriangularToeplitz(3, lower=True).to_dense((jnp.array([1.0, 2.0, 3.0]),)).tolist()
      [[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [3.0, 2.0, 1.0]]
    """

    size: int
    lower: bool

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a Toeplitz matrix must have at least one row, got {self.size}.")

    @property
    def dim(self) -> int:
        """The number of rows, d."""
        return self.size

    @property
    def name(self) -> str:
        """The name, for tables."""
        return "triltoeplitz" if self.lower else "triutoeplitz"

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One vector."""
        return ((self.dim,),)

    def identity(self, dtype: DTypeLike) -> Parts:
        """Returns the parts of I, of `dtype`."""
        return (jnp.zeros(self.dim, dtype).at[0].set(1),)

    def to_dense(self, parts: Parts) -> jax.Array:
        """Returns the matrix, [d, d], in the parts' dtype."""
        (diagonals,) = parts
        index = jnp.arange(self.dim)
        offset = jnp.expand_dims(index, 1) - jnp.expand_dims(index, 0)
        lower = jnp.where(offset < 0, 0, diagonals[jnp.abs(offset)])
        return lower if self.lower else lower.T

    def matmul(self, left: Parts, right: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of L R, the convolution of the two."""
        del precision
        (a,), (b,) = left, right
        return (self._from_spectrum(self._spectrum(a) * self._spectrum(b)),)

    def apply(
        self, parts: Parts, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by K, a convolution or correlation."""
        del precision
        return self._filter(parts, tensor, axis, convolve=self.lower)

    def apply_transposed(
        self, parts: Parts, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by Kᵀ."""
        del precision
        return self._filter(parts, tensor, axis, convolve=not self.lower)

    def project_outer(self, tensor: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(X Xᵀ). A diagonal's sum is the autocorrelation of X's columns at its offset."""
        del precision
        spectrum = self._spectrum(tensor, axis)
        others = tuple(other for other in range(tensor.ndim) if other != axis)
        power = jnp.sum(jnp.square(spectrum.real) + jnp.square(spectrum.imag), axis=others)
        return self._average_diagonals(self._from_spectrum(power))

    def project_inner(self, parts: Parts, *, precision: jax.lax.PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(Kᵀ K). The k-th diagonal of Kᵀ K sums to Σₐ (d − a) cₐ cₐ₋ₖ, K's part being c."""
        del precision
        c = upcast(parts[0])
        weighted = self._lengths(c.dtype) * c
        return self._average_diagonals(self._from_spectrum(self._spectrum(weighted) * jnp.conj(self._spectrum(c))))

    def squared_norm(self, parts: Parts) -> jax.Array:
        """Returns ‖K‖²_F = Σₐ (d − a) cₐ²."""
        c = upcast(parts[0])
        return jnp.sum(self._lengths(c.dtype) * jnp.square(c))

    def flops(self, columns: int) -> Flops:
        """Returns what the operations cost, on a tensor of d × `columns` entries."""
        transform = 5 * self._length * (self._length.bit_length() - 1) // 2
        return Flops(
            apply=transform * (2 * columns + 1) + 3 * self._length * columns,
            project_outer=transform * (columns + 1) + 2 * self._length * columns,
            matmul=3 * transform + 3 * self._length,
            project_inner=3 * transform + 3 * self._length,
        )

    @property
    def _length(self) -> int:
        """The length of the transforms: the least power of two at which nothing wraps around."""
        return 1 << (2 * self.dim - 2).bit_length()

    def _lengths(self, dtype: DTypeLike) -> jax.Array:
        """Returns the number of entries of each diagonal."""
        return jnp.arange(self.dim, 0, -1, dtype=dtype)

    def _average_diagonals(self, sums: jax.Array) -> Parts:
        """Returns the parts of Π̂(S) from the sums along the diagonals of S; all but the main one count twice."""
        average = sums / self._lengths(sums.dtype)
        return (jnp.where(jnp.arange(self.dim) == 0, average, 2 * average),)

    def _spectrum(self, tensor: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.fft.rfft(upcast(tensor), self._length, axis)

    def _from_spectrum(self, spectrum: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.slice_in_dim(jnp.fft.irfft(spectrum, self._length, axis), 0, self.dim, axis=axis)

    def _filter(self, parts: Parts, tensor: jax.Array, axis: int, *, convolve: bool) -> jax.Array:
        """Returns `tensor` convolved or correlated along `axis` with the part."""
        (c,) = parts
        response = self._spectrum(c) if convolve else jnp.conj(self._spectrum(c))
        others = tuple(other for other in range(tensor.ndim) if other != axis)
        spectrum = jnp.expand_dims(response, others) * self._spectrum(tensor.astype(c.dtype), axis)
        return self._from_spectrum(spectrum, axis)

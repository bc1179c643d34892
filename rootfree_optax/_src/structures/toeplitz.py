"""Triangular Toeplitz matrices: constant along each diagonal, so that a product is a convolution.

The one part [d] has the entry of the main diagonal, then the entries of the diagonals below it (lower triangular) or
above it (upper triangular). The transpose of a lower-triangular matrix is upper triangular with the same part, products
commute, and Kᵀ K and K Kᵀ have equal sums along their diagonals. So every operation but `apply` and `to_dense` is the
same for both kinds.

XLA does not partition Fourier transforms: it would gather a sharded stack on every device. Inside `jax.shard_map` the
transforms stay local.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from rootfree_optax._src.numerics.arithmetic import upcast
from rootfree_optax._src.structures.base import Flops, Parts, Structure, other_axes


@dataclasses.dataclass(frozen=True, repr=False)
class TriangularToeplitz(Structure):
    """Lower- or upper-triangular Toeplitz matrices.

    Products are computed by fast Fourier transforms, in at least float32. Their errors are relative to the largest
    entry.

    Args:
      size: the number of rows, d, at least one.
      lower: whether the matrices are lower triangular; else, upper triangular.

    Raises:
      ValueError: if `size` is below one.

    Example:
      >>> import jax.numpy as jnp
      >>> TriangularToeplitz(3, lower=True).to_dense((jnp.array([1.0, 2.0, 3.0]),)).tolist()
      [[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [3.0, 2.0, 1.0]]
    """

    size: int
    lower: bool

    @property
    def dim(self) -> int:
        return self.size

    @property
    def name(self) -> str:
        return "triltoeplitz" if self.lower else "triutoeplitz"

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.dim,),)

    def identity(self, dtype: DTypeLike) -> Parts:
        return (jnp.zeros(self.dim, dtype).at[0].set(1),)

    def to_dense(self, parts: Parts) -> jax.Array:
        (diagonals,) = parts
        index = jnp.arange(self.dim)
        offset = jnp.expand_dims(index, 1) - jnp.expand_dims(index, 0)
        lower = jnp.where(offset < 0, 0, diagonals[jnp.abs(offset)])
        return lower if self.lower else lower.T

    def matmul(self, left: Parts, right: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of L R, the convolution of the two."""
        (a,), (b,) = left, right
        return (self._from_spectrum(self._spectrum(a) * self._spectrum(b)),)

    def apply(
        self, parts: Parts, tensor: jax.Array, axis: int, *, transposed: bool = False, precision: PrecisionLike = None
    ) -> jax.Array:
        """Returns `tensor` multiplied along `axis` by K, or by Kᵀ: convolved (lower triangular) or correlated."""
        (c,) = parts
        response = self._spectrum(c) if self.lower != transposed else jnp.conj(self._spectrum(c))
        spectrum = self._spectrum(tensor.astype(c.dtype), axis)
        return self._from_spectrum(jnp.expand_dims(response, other_axes(tensor, axis)) * spectrum, axis)

    def project_outer(self, tensor: jax.Array, axis: int, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(X Xᵀ). The k-th diagonal of X Xᵀ sums to the autocorrelation of X's columns at k."""
        spectrum = self._spectrum(tensor, axis)
        power = jnp.sum(jnp.square(spectrum.real) + jnp.square(spectrum.imag), axis=other_axes(tensor, axis))
        return self._average_diagonals(self._from_spectrum(power))

    def project_inner(self, parts: Parts, *, precision: PrecisionLike = None) -> Parts:
        """Returns the parts of Π̂(Kᵀ K). The k-th diagonal of Kᵀ K sums to Σₐ (d − a) cₐ cₐ₋ₖ, with c the part."""
        c = upcast(parts[0])
        weighted = self._lengths(c.dtype) * c
        return self._average_diagonals(self._from_spectrum(self._spectrum(weighted) * jnp.conj(self._spectrum(c))))

    def squared_norm(self, parts: Parts) -> jax.Array:
        """Returns ‖K‖²_F = Σₐ (d − a) cₐ²."""
        c = upcast(parts[0])
        return jnp.sum(self._lengths(c.dtype) * jnp.square(c))

    def flops(self, columns: int) -> Flops:
        transform = 5 * self._length * (self._length.bit_length() - 1) // 2
        return Flops(
            apply=transform * (2 * columns + 1) + 3 * self._length * columns,
            project_outer=transform * (columns + 1) + 2 * self._length * columns,
            matmul=3 * transform + 3 * self._length,
            project_inner=3 * transform + 3 * self._length,
        )

    @property
    def _length(self) -> int:
        """The length of the transforms: the least power of two at which no product wraps around."""
        return 1 << (2 * self.dim - 2).bit_length()

    def _lengths(self, dtype: DTypeLike) -> jax.Array:
        """Returns the number of entries of each diagonal."""
        return jnp.arange(self.dim, 0, -1, dtype=dtype)

    def _average_diagonals(self, sums: jax.Array) -> Parts:
        """Returns the parts of Π̂(S) from the sums along the diagonals of S. All but the main diagonal count twice."""
        average = sums / self._lengths(sums.dtype)
        return (jnp.where(jnp.arange(self.dim) == 0, average, 2 * average),)

    def _spectrum(self, tensor: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.fft.rfft(upcast(tensor), self._length, axis)

    def _from_spectrum(self, spectrum: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.slice_in_dim(jnp.fft.irfft(spectrum, self._length, axis), 0, self.dim, axis=axis)

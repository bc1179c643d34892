"""Matrix products in a factor's dtype, accumulated in at least float32."""

import jax
import jax.numpy as jnp

from rootfree_optax._src.numerics.dtypes import upcast


def einsum(subscripts: str, *operands: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
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


def matmul(left: jax.Array, right: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Returns the product of matrices [..., i, j] and [..., j, k]."""
    return einsum("...ij,...jk->...ik", left, right, precision=precision)

"""Matrix products that accumulate in at least float32."""

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike

from rootfree_optax._src.numerics.dtypes import upcast


def einsum(subscripts: str, *operands: jax.Array, precision: PrecisionLike) -> jax.Array:
    """Returns an einsum that is accumulated, and returned, in the operands' accumulation dtype."""
    wide = [upcast(operand) for operand in operands]
    if operands[0].dtype != jnp.bfloat16:
        return jnp.einsum(subscripts, *wide, precision=precision)
    # XLA for CPUs fails at run time on some products of bfloat16 arrays. So the arrays are passed in float32, which
    # holds them exactly. Accelerators may multiply them in their bfloat16 units, which is exact, too.
    units = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return jax.lax.platform_dependent(
        *wide,
        cpu=lambda *arrays: jnp.einsum(subscripts, *arrays),
        default=lambda *arrays: jnp.einsum(subscripts, *arrays, precision=units),
    )


def matmul(left: jax.Array, right: jax.Array, *, precision: PrecisionLike) -> jax.Array:
    """Returns the product of matrices [..., i, j] and [..., j, k], in the accumulation dtype."""
    return einsum("...ij,...jk->...ik", left, right, precision=precision)

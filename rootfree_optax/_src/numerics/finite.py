"""The largest entry of an array and its root mean square, and tests for finite entries."""

import functools

import jax
import jax.numpy as jnp


def max_abs(parts: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the largest absolute value of all parts, a scalar; non-finite if any entry is non-finite.

    The bits of the absolute values are compared as integers. They are ordered as the values are, with NaN above all.
    XLA's maximum of floating-point numbers may drop a NaN on a CPU.
    """
    of_bits = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[parts[0].dtype.itemsize]
    largest = [jnp.max(jax.lax.bitcast_convert_type(jnp.abs(part), of_bits), initial=0) for part in parts]
    return jax.lax.bitcast_convert_type(functools.reduce(jnp.maximum, largest), parts[0].dtype)


def mean_sizes(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean(|a|) and √mean(|a|²), scalars, neither of which over- or underflows."""
    size = jnp.abs(array)
    largest = jnp.max(size, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return jnp.mean(size / unit) * unit, jnp.sqrt(jnp.mean(jnp.square(size / unit))) * unit


def all_finite(tree: object) -> jax.Array:
    """Returns whether every entry of every array is finite, a scalar."""
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])

"""What differs between versions of JAX."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def match_varying_axes(state: Any, params: Any, axes: tuple[str, ...]) -> Any:
    """Returns a new state's arrays with the types that updates will give them inside `jax.shard_map`.

    These tell over which axes of the mesh an array varies: those that a parameter varies over, and `axes`. Branches and
    loops want arrays of one type. Outside `jax.shard_map` the state is returned as it is.

    Args:
      state: a tree of arrays.
      params: the parameters.
      axes: the mesh axes over which the state is a device's own part.
    """
    traced = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.core.Tracer)]
    if not traced or AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return state
    # Never true, but of the parameters' type: how that is spelled differs between versions of JAX.
    sums = [jnp.sum(leaf) for leaf in traced]
    never = functools.reduce(jnp.logical_or, [(total != total) & (total == total) for total in sums])
    if axes:
        never |= jax.lax.axis_index(axes) < 0
    return jax.tree.map(lambda array: jnp.where(never, jnp.zeros_like(array), array), state)

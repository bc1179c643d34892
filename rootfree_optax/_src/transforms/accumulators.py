"""The averages that diagonal transformations keep, of gradients and of their squares: trees like the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.common import trees
from rootfree_optax._src.common.meshes import reshard
from rootfree_optax._src.numerics.arithmetic import dtype_like, dtype_of_squares


def init_average(params: optax.Params, dtype: DTypeLike | None) -> Any:
    """Returns averages of zero gradients, of a real dtype; None for each parameter's own."""
    return jax.tree.map(lambda param: fill_like(param, 0, dtype_like(param, dtype)), params)


def init_squares(params: optax.Params, dtype: DTypeLike | None = None) -> Any:
    """Returns averages of zero squares, of a real dtype; None for each parameter's own, see `dtype_of_squares`."""
    return jax.tree.map(lambda param: fill_like(param, 0, dtype or dtype_of_squares(param)), params)


def fill_like(param: Any, value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Returns an array of one value, of a parameter's shape, and sharded as that is."""
    array = jnp.full_like(param, value, dtype)
    # In a program that is compiled without `jax.set_mesh`, a constant has no mesh in its type.
    return reshard(array, param) if isinstance(param, jax.core.Tracer) else array


def update_squares(
    average: Callable[[jax.Array, jax.Array], jax.Array], old: Any, gradients: Any, curvature: Any | None
) -> Any:
    """Returns averages of squares after they have taken in `curvature`, or the gradients where that is None.

    Args:
      average: from an old average, and a gradient or samples of it, to the new average.
      old: the averages before; one stays as it is where its gradient is None.
      gradients: a tree like the parameters.
      curvature: a tree like the gradients, or one with one more, leading axis of samples; or None.

    Raises:
      ValueError: for a tree unlike the parameters.
    """
    trees.require_like(gradients, old, name="gradients")
    if curvature is not None:
        trees.require_like(curvature, old, name="curvature", sample_axis=True)
    evidence = gradients if curvature is None else curvature
    take_in = lambda g, s: s if g is None else average(s, jnp.asarray(g))
    return jax.tree.map(take_in, evidence, old, is_leaf=trees.is_none)

"""Ready-made groups: a weight with its bias, a parameter as a vector, a parameter as a matrix."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rootfree_optax._src.layout.axes import Shape
from rootfree_optax._src.layout.group import Group


def _join_weight_and_bias(weight: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.concatenate([weight.reshape(-1, bias.size), bias.reshape(1, bias.size)])


def _split_weight_and_bias(tensor: jax.Array, weight_shape: Shape, bias_shape: Shape) -> tuple[jax.Array, ...]:
    return tensor[:-1].reshape(weight_shape), tensor[-1:].reshape(bias_shape)


def _bias_is_last_of_weight(weight_shape: Shape, bias_shape: Shape) -> bool:
    return 0 < len(bias_shape) < len(weight_shape) and weight_shape[-len(bias_shape) :] == bias_shape


def weight_and_bias(weight: str = "kernel", bias: str = "bias", pattern: str | None = None) -> Group:
    """Joins a layer's weight [*inputs, *outputs] and its bias [*outputs] into a matrix with the bias as its last row.

    The matrix is [prod(inputs) + 1, prod(outputs)]. Where the weight's last axes are not the bias's, as in a
    normalization layer, the two stay apart.

    Args:
      weight: the weight's last key.
      bias: the bias's last key.
      pattern: a regular expression to be found in the weight's key path; None takes all.

    Returns:
      A rule for `Layout(group=(…,))`.

    Raises:
      ValueError: for a pattern that is no regular expression.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
      >>> plan = rf.Layout(group=(rf.weight_and_bias(),)).plan(params)
      >>> [stack.shape for stack in plan.stacks]
      [(4, 4)]
    """
    return Group((weight, bias), _join_weight_and_bias, _split_weight_and_bias, pattern, _bias_is_last_of_weight)


def _flattened(array: jax.Array) -> jax.Array:
    return array.reshape(-1)


def _reshaped(tensor: jax.Array, shape: Shape) -> tuple[jax.Array, ...]:
    return (tensor.reshape(shape),)


def flatten(pattern: str) -> Group:
    """Flattens each parameter whose key path has `pattern` in it to one axis; by default, that has a diagonal factor.

    Args:
      pattern: a regular expression.

    Returns:
      A rule for `Layout(group=(…,))`.

    Raises:
      ValueError: for a pattern that is no regular expression.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> plan = rf.Layout(group=(rf.flatten("embedding"),)).plan({"embedding": jnp.zeros((100, 8))})
      >>> [stack.shape for stack in plan.stacks]
      [(800,)]
    """
    return Group((), _flattened, _reshaped, pattern)


@dataclasses.dataclass(frozen=True)
class _ToMatrix:
    rows: int

    def __call__(self, array: jax.Array) -> jax.Array:
        return array.reshape(math.prod(array.shape[: self.rows]), -1)


@dataclasses.dataclass(frozen=True)
class _HasMoreAxes:
    rows: int

    def __call__(self, shape: Shape) -> bool:
        return len(shape) > self.rows


def as_matrix(pattern: str, rows: int) -> Group:
    """Makes a matrix of each parameter whose key path has `pattern` in it and that has more than `rows` axes.

    Args:
      pattern: a regular expression.
      rows: how many leading axes make the matrix's rows, at least one; the others make its columns. The query kernel
        [features, heads, head features] of an attention layer takes one, its output kernel two.

    Returns:
      A rule for `Layout(group=(…,))`.

    Raises:
      ValueError: for less than one axis, or a pattern that is no regular expression.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> plan = rf.Layout(group=(rf.as_matrix("query", 1),)).plan({"query": jnp.zeros((16, 2, 8))})
      >>> [stack.shape for stack in plan.stacks]
      [(16, 16)]
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}.")
    return Group((), _ToMatrix(rows), _reshaped, pattern, _HasMoreAxes(rows))

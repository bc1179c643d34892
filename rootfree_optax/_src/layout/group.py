"""Groups: parameters that are preconditioned as one tensor, and single ones that are given another shape first.

Three rules come ready-made: a weight with its bias, a parameter as a vector, a parameter as a matrix.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout.paths import require_expression

# The key that Flax's `nnx.Variable` and `nn.Partitioned` put around an array: no part of its name.
_BOX = "/value"


@dataclasses.dataclass(frozen=True)
class Group:
    """A rule that joins parameters with a common parent into one tensor.

    Functions compare by identity, so define `join`, `split` and `condition` once, at the top of a module: two layouts
    are then equal whenever their rules are.

    Args:
      members: the last keys of the parameters to join, such as ('kernel', 'bias'). Empty: each parameter by itself,
        to be given another shape.
      join: joins the members' arrays, in order, into one tensor.
      split: its inverse, called as split(tensor, *shapes) with the members' shapes; returns a tuple of arrays.
      pattern: a regular expression to be found in the key path of the first member; None takes all.
      condition: a predicate on the members' shapes, called as condition(*shapes). Where it fails, the rule does not
        apply. Shapes are those of one layer, without layer axes.

    Raises:
      ValueError: for a pattern that is no regular expression, or a member named twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from rootfree_optax._src.layout import Group, Layout
      >>> scale_and_bias = Group(
      ...     ("scale", "bias"),
      ...     join=lambda scale, bias: jnp.stack([scale, bias]),
      ...     split=lambda tensor, *shapes: (tensor[0], tensor[1]),
      ... )
      >>> params = {"norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
      >>> [stack.shape for stack in Layout(group=(scale_and_bias,)).plan(params).stacks]
      [(2, 8)]
    """

    members: tuple[str, ...]
    join: Callable[..., jax.Array]
    split: Callable[..., tuple[jax.Array, ...]]
    pattern: str | None = None
    condition: Callable[..., bool] | None = None

    def __post_init__(self) -> None:
        """Checks the members' names and the pattern."""
        if isinstance(self.members, str):
            raise ValueError(f"members must be a tuple of names, got the string {self.members!r}.")
        object.__setattr__(self, "members", tuple(self.members))
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"members of a group must differ, got {self.members}.")
        if self.pattern is not None:
            require_expression("pattern", self.pattern)


class Assignment(NamedTuple):
    """Parameters that are preconditioned as one tensor, by key path; a rule of None leaves one as it is."""

    name: str
    paths: tuple[str, ...]
    rule: Group | None


def assign(rules: Sequence[Group], shapes: Mapping[str, Shape]) -> tuple[Assignment, ...]:
    """Returns which parameters are joined, and by which rule: the first of the rules that applies to a parameter.

    Args:
      rules: the rules, in order.
      shapes: the shape of a layer of each parameter, by key path.

    Returns:
      A partition of the key paths, in the order of the groups' first members.
    """
    taken: dict[str, Assignment] = {}
    for rule in rules:
        for path in shapes:
            found = _find(rule, path, shapes)
            if found and not any(member in taken for member in found.paths):
                taken |= dict.fromkeys(found.paths, found)
    return tuple(dict.fromkeys(taken.get(path, Assignment(path, (path,), None)) for path in shapes))


def _find(rule: Group, path: str, shapes: Mapping[str, Shape]) -> Assignment | None:
    """Returns the group whose first member is `path`, None if the rule does not apply."""
    if rule.pattern is not None and not re.search(rule.pattern, path):
        return None
    found = Assignment(path, (path,), rule)
    if rule.members:
        match = re.fullmatch(f"(|.*/){re.escape(rule.members[0])}({_BOX})?", path)
        if match is None:
            return None
        parent, box = match[1], match[2] or ""
        found = Assignment(parent + "+".join(rule.members), tuple(parent + name + box for name in rule.members), rule)
        if not shapes.keys() >= set(found.paths):
            return None
    applies = rule.condition is None or rule.condition(*(shapes[member] for member in found.paths))
    return found if applies else None


def join_members(arrays: Sequence[jax.Array], rule: Group, layers: int) -> jax.Array:
    """Joins a group's arrays of one dtype, each with `layers` leading layer axes, layer by layer."""
    join = rule.join
    for _ in range(layers):
        join = jax.vmap(join)
    return join(*arrays)


def split_members(tensor: jax.Array, rule: Group, shapes: Sequence[Shape], layers: int) -> tuple[jax.Array, ...]:
    """Splits a group's tensor into its members, layer by layer: the inverse of `join_members`.

    Args:
      tensor: [*layers, *joined].
      rule: the group's rule.
      shapes: the shapes of a layer of each member.
      layers: the number of layer axes.
    """
    split = lambda layer: tuple(rule.split(layer, *shapes))
    for _ in range(layers):
        split = jax.vmap(split)
    return split(tensor)


def joined_shape(rule: Group, shapes: Mapping[str, Shape]) -> Shape:
    """Returns the shape of a layer of a group's tensor, after checking that the rule can be undone.

    Args:
      rule: the group's rule.
      shapes: the shapes of a layer of each member, by key path.

    Raises:
      ValueError: if splitting the tensor does not give the members' shapes, or if the tensor has no entries.
    """
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]
    tensor = jax.eval_shape(rule.join, *arrays)
    parts = jax.eval_shape(lambda tensor: split_members(tensor, rule, tuple(shapes.values()), layers=0), tensor)
    if [part.shape for part in parts] != list(shapes.values()):
        raise ValueError(
            f"split must undo join, but join makes {tensor.shape} of {dict(shapes)} and split makes "
            f"{[part.shape for part in parts]} of that."
        )
    if 0 in tensor.shape:
        raise ValueError(f"join must make a tensor with entries, got {tensor.shape} of {dict(shapes)}.")
    return tensor.shape


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

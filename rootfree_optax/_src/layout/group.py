"""Groups: rules that join parameters into one tensor, or reshape a single parameter.

`weight_and_bias`, `flatten` and `as_matrix` are ready-made rules.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.common.validate import whole_number
from rootfree_optax._src.layout.paths import require_expression, require_match

# What layers call a weight and its bias: in Flax, Haiku, Equinox.
_WEIGHTS_AND_BIASES = {
    ("kernel", "bias"): "weight_and_bias()",
    ("w", "b"): "weight_and_bias('w', 'b')",
    ("weight", "bias"): "weight_and_bias('weight')",
}
# Which axes of a weight are the outputs, by what layers call it: the last in Flax, Haiku and Keras, else the first.
_OUTPUT_AXES = {"kernel": -1, "w": -1, "weight": 0}


@dataclasses.dataclass(frozen=True)
class Group:
    """A rule that joins parameters with a common parent into one tensor, or reshapes a single parameter.

    All functions see one layer at a time, without layer axes. Functions compare by identity, so define them at the top
    of a module: two layouts with the same rules are then equal.

    Args:
      members: the last keys of the parameters to join, such as ('kernel', 'bias'). Empty: the rule reshapes single
        parameters.
      join: joins the members' arrays, in order, into one tensor.
      split: the inverse of `join`, called as split(tensor, *shapes) with the members' shapes. Returns a tuple of
        arrays.
      pattern: a regular expression to find in the key path of the first member. None matches every path.
      condition: a predicate on the members' shapes, called as condition(*shapes). The rule applies only where it is
        true. None: always.

    Raises:
      ValueError: for an invalid regular expression, or the same member twice.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> scale_and_bias = rf.Group(
      ...     ("scale", "bias"),
      ...     join=lambda scale, bias: jnp.stack([scale, bias]),
      ...     split=lambda tensor, *shapes: (tensor[0], tensor[1]),
      ... )
      >>> params = {"norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
      >>> [stack.shape for stack in rf.Layout(group=(scale_and_bias,)).plan(params).stacks]
      [(2, 8)]
    """

    members: tuple[str, ...]
    join: Callable[..., jax.Array]
    split: Callable[..., tuple[jax.Array, ...]]
    pattern: str | None = None
    condition: Callable[..., bool] | None = None

    def __post_init__(self) -> None:
        """Checks the names of the members and the pattern."""
        if isinstance(self.members, str):
            raise ValueError(f"members must be a tuple of names, got the string {self.members!r}.")
        object.__setattr__(self, "members", tuple(self.members))
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"members of a group must be distinct, got {self.members}.")
        if self.pattern is not None:
            require_expression("pattern", self.pattern)

    @property
    def keeps_order(self) -> bool:
        """Whether the rule only reshapes a parameter."""
        return self.split is _reshape


class Assignment(NamedTuple):
    """The parameters of one tensor.

    Args:
      name: the key path, or the name of a group, such as 'params/dense/kernel+bias'.
      plain: the same as patterns and callables see it, such as 'dense/kernel+bias', see `plain_paths`.
      paths: the key paths of the parameters.
      rule: the rule that joins them, or None for a single parameter as it is.
    """

    name: str
    plain: str
    paths: tuple[str, ...]
    rule: Group | None


def assign(rules: Sequence[Group], shapes: Mapping[str, Shape], plain: Mapping[str, str]) -> tuple[Assignment, ...]:
    """Assigns each parameter to the first rule that applies to it.

    Args:
      rules: the rules, in order.
      shapes: the shape of one layer of each parameter, by key path.
      plain: the key paths as patterns see them, by key path.

    Returns:
      Assignments with every key path in exactly one of them, in the order of their first members.

    Raises:
      ValueError: from a rule's condition, with the key paths.
    """
    taken: dict[str, Assignment] = {}
    paths = {plain[path]: path for path in shapes}
    for rule in rules:
        for found in _groups(rule, paths):
            if not any(member in taken for member in found.paths) and _applies(rule, found.paths, shapes):
                taken |= dict.fromkeys(found.paths, found)
    alone = {path: Assignment(path, plain[path], (path,), None) for path in shapes}
    return tuple(dict.fromkeys(taken.get(path, alone[path]) for path in shapes))


def _groups(rule: Group, paths: Mapping[str, str]) -> Iterator[Assignment]:
    """Yields what a rule finds by names and pattern, before its condition; `paths` maps plain paths to key paths."""
    for plain, path in paths.items():
        if rule.pattern is not None and not re.search(rule.pattern, plain):
            continue
        if not rule.members:
            yield Assignment(path, plain, (path,), rule)
            continue
        if not f"/{plain}".endswith(f"/{rule.members[0]}"):
            continue
        parent = plain.removesuffix(rule.members[0])
        members = [parent + member for member in rule.members]
        if paths.keys() >= set(members):
            joined = parent + "+".join(rule.members)
            prefix = "params/" if path.startswith(f"params/{plain}") else ""
            yield Assignment(prefix + joined, joined, tuple(paths[member] for member in members), rule)


def _applies(rule: Group, paths: Sequence[str], shapes: Mapping[str, Shape]) -> bool:
    try:
        return rule.condition is None or rule.condition(*(shapes[path] for path in paths))
    except ValueError as error:
        raise ValueError(f"{error} The parameters are {', '.join(map(repr, paths))}.") from None


def require_groups(rules: Sequence[Group], plain: Sequence[str]) -> None:
    """Raises a ValueError for a rule whose names and pattern match no parameters of a non-empty tree.

    Args:
      rules: the rules.
      plain: the key paths of all parameters, as patterns see them.
    """
    for rule in rules:
        if rule.pattern is not None:
            require_match("the pattern of a group", rule.pattern, plain)
        if plain and not any(_groups(rule, dict(zip(plain, plain, strict=True)))):
            last_keys = sorted({path.rpartition("/")[2] for path in plain})
            known = [call for pair, call in _WEIGHTS_AND_BIASES.items() if set(pair) <= set(last_keys)]
            hint = f" Did you mean {' or '.join(known)}?" if known else ""
            where = "" if rule.pattern is None else f" where the first matches {rule.pattern!r}"
            raise ValueError(
                f"a group must find parameters named {' and '.join(map(repr, rule.members))} under a common parent"
                f"{where}, but the last keys of the parameters are {', '.join(map(repr, last_keys))}.{hint}"
            )


def join_members(arrays: Sequence[jax.Array], rule: Group, layers: int) -> jax.Array:
    """Joins arrays of one dtype, each with `layers` leading layer axes, layer by layer."""
    return _by_layer(rule.join, layers)(*arrays)


def split_members(tensor: jax.Array, rule: Group, shapes: Sequence[Shape], layers: int) -> tuple[jax.Array, ...]:
    """Splits a group's tensor into its members, layer by layer: the inverse of `join_members`.

    Args:
      tensor: [*layers, *joined].
      rule: the group's rule.
      shapes: the shape of one layer of each member.
      layers: the number of layer axes.
    """
    return _by_layer(lambda layer: tuple(rule.split(layer, *shapes)), layers)(tensor)


def _by_layer(function: Callable[..., Any], layers: int) -> Callable[..., Any]:
    for _ in range(layers):
        function = jax.vmap(function)
    return function


def join_shapes(rule: Group, shapes: Mapping[str, Shape]) -> Shape:
    """Returns the shape of one layer of a group's tensor, after checking that `split` inverts `join`.

    Args:
      rule: the group's rule.
      shapes: the shape of one layer of each member, by key path.

    Raises:
      ValueError: if `split` does not restore the members' shapes, or if the tensor has no entries.
    """
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]
    tensor = jax.eval_shape(rule.join, *arrays)
    parts = jax.eval_shape(lambda tensor: split_members(tensor, rule, tuple(shapes.values()), layers=0), tensor)
    if [part.shape for part in parts] != list(shapes.values()):
        raise ValueError(
            f"split must be the inverse of join, but join returns {tensor.shape} for {dict(shapes)} and split returns "
            f"{[part.shape for part in parts]} for that tensor."
        )
    if 0 in tensor.shape:
        raise ValueError(f"join must return a tensor with entries, got {tensor.shape} for {dict(shapes)}.")
    return tensor.shape


def _join_bias_as_row(weight: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.concatenate([weight.reshape(-1, bias.size), bias.reshape(1, bias.size)])


def _split_bias_as_row(tensor: jax.Array, weight_shape: Shape, bias_shape: Shape) -> tuple[jax.Array, ...]:
    return tensor[:-1].reshape(weight_shape), tensor[-1:].reshape(bias_shape)


def _join_bias_as_column(weight: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.concatenate([weight.reshape(bias.size, -1), bias.reshape(bias.size, 1)], axis=1)


def _split_bias_as_column(tensor: jax.Array, weight_shape: Shape, bias_shape: Shape) -> tuple[jax.Array, ...]:
    return tensor[:, :-1].reshape(weight_shape), tensor[:, -1:].reshape(bias_shape)


def _output_is_last(weight_shape: Shape, bias_shape: Shape) -> bool:
    return 0 < len(bias_shape) < len(weight_shape) and weight_shape[-len(bias_shape) :] == bias_shape


def _output_is_first(weight_shape: Shape, bias_shape: Shape) -> bool:
    # The bias of a convolution in Equinox is [out, 1, 1].
    while len(bias_shape) > 1 and bias_shape[-1] == 1:
        bias_shape = bias_shape[:-1]
    return 0 < len(bias_shape) < len(weight_shape) and weight_shape[: len(bias_shape)] == bias_shape


@dataclasses.dataclass(frozen=True)
class _WeightFitsBias:
    """The condition of `weight_and_bias`: false for a normalization layer, an error for shapes that do not fit."""

    output_axis: int

    def __call__(self, weight_shape: Shape, bias_shape: Shape) -> bool:
        # A normalization layer scales and shifts entry by entry, which is no matrix.
        if len(weight_shape) < 2 or weight_shape == bias_shape:
            return False
        fits = {-1: _output_is_last(weight_shape, bias_shape), 0: _output_is_first(weight_shape, bias_shape)}
        if not fits[self.output_axis]:
            other = -1 - self.output_axis
            hint = (
                f"which fit output_axis={other} only."
                if fits[other]
                else "which fit neither 0 nor -1. Set layer_axes if an axis indexes layers, or exclude the layer with "
                "the pattern."
            )
            raise ValueError(
                f"output_axis={self.output_axis} of weight_and_bias must be the weight's output axis, got a weight of "
                f"shape {weight_shape} and a bias of shape {bias_shape}, {hint}"
            )
        return True


def weight_and_bias(
    weight: str = "kernel", bias: str = "bias", pattern: str | None = None, *, output_axis: int | None = None
) -> Group:
    """Joins a layer's weight and its bias into one matrix.

    With the output axes last, [*inputs, *outputs], the bias [*outputs] is the last row of the matrix
    [prod(inputs) + 1, prod(outputs)]. With the output axes first, it is the last column of
    [prod(outputs), prod(inputs) + 1].

    A weight with a single axis, or of the same shape as its bias, is that of a normalization layer: it is not joined.

    Args:
      weight: the weight's last key.
      bias: the bias's last key.
      pattern: a regular expression to find in the weight's key path. None matches every path.
      output_axis: which axes of the weight are the outputs: -1, the last ones, or 0, the first ones. None: the last of
        a "kernel" or "w" (Flax, Haiku, Keras), the first of a "weight" (Equinox, PyTorch). Shapes are checked against
        it; for a square weight they cannot tell.

    Returns:
      A rule for `Layout(group=(…,))`.

    Raises:
      ValueError: for an invalid regular expression or another output axis, and for None where the weight has another
        name. `Layout.plan` raises one for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
      >>> plan = rf.Layout(group=(rf.weight_and_bias(),)).plan(params)
      >>> [stack.shape for stack in plan.stacks]
      [(4, 4)]
      >>> params = {"linear": {"weight": jnp.zeros((4, 3)), "bias": jnp.zeros(4)}}
      >>> plan = rf.Layout(group=(rf.weight_and_bias("weight"),)).plan(params)
      >>> [stack.shape for stack in plan.stacks]
      [(4, 4)]
    """
    members = (weight, bias)
    output_axis = _OUTPUT_AXES.get(weight) if output_axis is None else output_axis
    if output_axis == -1:
        return Group(members, _join_bias_as_row, _split_bias_as_row, pattern, _WeightFitsBias(-1))
    if output_axis == 0:
        return Group(members, _join_bias_as_column, _split_bias_as_column, pattern, _WeightFitsBias(0))
    raise ValueError(
        f"output_axis must be -1 (the last axes) or 0 (the first axes) for weights called {weight!r}, got "
        f"{output_axis!r}."
    )


def _flatten(array: jax.Array) -> jax.Array:
    return array.reshape(-1)


def _reshape(tensor: jax.Array, shape: Shape) -> tuple[jax.Array, ...]:
    return (tensor.reshape(shape),)


def flatten(pattern: str) -> Group:
    """Flattens each parameter with a match of `pattern` in its key path to one axis, with a diagonal factor by default.

    Args:
      pattern: a regular expression.

    Returns:
      A rule for `Layout(group=(…,))`.

    Raises:
      ValueError: for an invalid regular expression.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> plan = rf.Layout(group=(rf.flatten("table"),)).plan({"table": jnp.zeros((100, 8))})
      >>> [stack.shape for stack in plan.stacks]
      [(800,)]
    """
    return Group((), _flatten, _reshape, pattern)


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
    """Reshapes each parameter with a match of `pattern` in its key path and more than `rows` axes to a matrix.

    Args:
      pattern: a regular expression.
      rows: how many leading axes become the rows, at least 1; the other axes become the columns. Use 1 for an attention
        layer's query kernel [features, heads, head features], and 2 for its output kernel.

    Returns:
      A rule for `Layout(group=(…,))`.

    Raises:
      ValueError: for `rows` below 1, or an invalid regular expression.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> plan = rf.Layout(group=(rf.as_matrix("query", 1),)).plan({"query": jnp.zeros((16, 2, 8))})
      >>> [stack.shape for stack in plan.stacks]
      [(16, 16)]
    """
    rows = whole_number("rows", rows)
    return Group((), _ToMatrix(rows), _reshape, pattern, _HasMoreAxes(rows))

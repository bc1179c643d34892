"""A layout: the user's choices of how parameters become blocks, from which a plan is made."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rootfree_optax._src.common import trees
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.common.validate import require_at_least
from rootfree_optax._src.layout import rules
from rootfree_optax._src.layout.group import Assignment, Group, assign, joined_shape, require_groups
from rootfree_optax._src.layout.paths import EMBEDDINGS, plain_paths, require_match
from rootfree_optax._src.layout.plan import Plan, Rest
from rootfree_optax._src.layout.split import Cut
from rootfree_optax._src.layout.stack import place
from rootfree_optax._src.layout.unit import Unit, merged, squeezed, stacks_of, without_axes
from rootfree_optax._src.structures import Structure, StructureFactory, dense, diagonal

_LONGEST_AXIS = 32_768


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters become blocks with one factor per axis: decided once, from key paths and shapes alone.

    In this order, axes that index layers are set apart, parameters are joined by the rules of `group`, axes of length
    one are dropped, neighbouring axes are merged, each axis gets a structure, and long axes are cut. All blocks
    of one shape, structure and dtype, over the whole tree, then form one stack.

    Regular expressions and callables see one key path in every framework: without a leading 'params/', and without
    the '/value' or '/array' of a box around a single array. An expression that is found in no parameter's path is an
    error. Under `optax.masked` and `optax.partition` the parameters are those that remain, so that each inner optimizer
    needs a layout whose expressions speak of its own parameters alone; a tree without any passes.

    Args:
      structure: the structure of the factors. None: `dense` on axes of at most `max_dense_dim` and `diagonal` on longer
        ones, if the parameter has two axes or more (before any are merged), and `diagonal` if it has one. A name: for
        every axis of every parameter. A tuple: a name for each axis. A mapping: from the number of axes to a name or
        tuple. A callable: from the key path and the shape to a name, a tuple, or None for the default. Axes are always
        counted per layer, squeezed and merged; for a name within a tuple or mapping, or returned by a callable, a
        factory may stand, from a number of rows to a `Structure`.
      max_dense_dim: the longest dense axis of the default rule, at least one. An axis that `block_size` cuts counts
        with the length of its blocks: it is they that have the factors. Explicit structures are not bound by it.
      block_size: the longest block, at least one. A longer axis is cut into as few blocks as possible, all of one length
        except for a shorter last one: with a `block_size` of 256, 512 into 256 and 256, 257 into 129 and 128. An axis
        with a diagonal structure is not cut. A block keeps its parameter's axes, even one of length one. None: no axis
        is cut.
      merge_dims: neighbouring axes are merged, from the left, while their product is at most this. None: none are.
      layer_axes: which axes index independent layers (`nn.scan`, `nnx.scan`, vmapped layers, experts), at any position.
        None: no axis does. An integer, for every parameter: 0 is the leading axis, 1 the second (`param_scan_axis=1` of
        MaxText), -1 the last. A tuple, for every parameter: the positions of several, such as layers and experts. A
        mapping from regular expressions to integers or tuples: the first expression that is found in the key path
        decides, and other parameters have no layer axes. A callable from the key path and the shape to an integer, a
        tuple or None. A position that a parameter does not have is an error.
      diagonal: which parameters have no factors, so that each of their entries is treated alone. None: no parameter. A
        regular expression that is found in their key paths, such as `EMBEDDINGS`, or a callable from the key path and
        the shape to a bool. Either excludes two more kinds, layer axes not counted: vectors and scalars, which are
        parameters with at most one axis longer than one, unless a rule of `group` applies to them; and parameters of
        more axes with one longer than 32,768. `diagonal` is decided before `group`. `Plan.rest` lists the parameters
        without factors, and why they have none.
      group: rules that join or reshape parameters, such as `weight_and_bias()`; the first that applies wins.
      factor_dtype: the floating-point dtype of the factors, of at least 16 bits. None: the widest of the stack's
        parameters. A dtype: for every factor. A tuple: one for each axis, None for the default. A mapping: from the
        number of axes to a dtype or tuple; blocks with another number of axes get the default. Axes are counted as for
        `structure`.

    Raises:
      ValueError: for a number out of range or an unknown structure.
      TypeError: for an argument of another kind than the above.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"kernel": jnp.zeros((768, 256)), "bias": jnp.zeros(256)}
      >>> plan = rf.Layout(block_size=256).plan(params)
      >>> [(stack.count, stack.shape) for stack in plan.stacks]
      [(1, (256,)), (3, (256, 256))]
      >>> [block.name for block in plan.blocks]
      ['bias', 'kernel[0, 0]', 'kernel[1, 0]', 'kernel[2, 0]']
    """

    structure: rules.StructureRule = None
    max_dense_dim: int = 2048
    block_size: int | None = None
    merge_dims: int | None = None
    layer_axes: rules.LayerRule = None
    diagonal: rules.DiagonalRule = None
    group: tuple[Group, ...] = ()
    factor_dtype: rules.DTypeRule = None

    def __post_init__(self) -> None:
        """Checks the arguments, and makes mappings and lists immutable."""
        for name in ("structure", "layer_axes", "group", "factor_dtype"):
            object.__setattr__(self, name, rules.frozen(getattr(self, name)))
        rules.require_structure_rule(self.structure)
        rules.require_layer_rule(self.layer_axes)
        rules.require_diagonal_rule(self.diagonal)
        rules.require_dtype_rule(self.factor_dtype, "factor_dtype")
        for name in ("max_dense_dim", "block_size", "merge_dims"):
            value = getattr(self, name)
            if value is None and name != "max_dense_dim":
                continue
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}.")
            require_at_least(name, value, 1)
        if not isinstance(self.group, tuple) or not all(isinstance(rule, Group) for rule in self.group):
            raise TypeError(f"group must be a tuple of Group rules, got {self.group!r}.")

    def plan(self, params: Any) -> Plan:
        """Returns the plan of a tree of parameters. Nothing is computed or allocated; equal trees give one plan.

        Args:
          params: arrays, `jax.ShapeDtypeStruct`s or tracers. Where there is None, there is no parameter.

        Raises:
          TypeError: for a parameter that is not real floating point.
          ValueError: for a rule that cannot be applied to a parameter, two parameters with one key path, or a regular
            expression that is found in no key path. It names the path, or the nearest ones.
        """
        return _plan(self, trees.real_shapes(params))


@functools.lru_cache(maxsize=128)
def _plan(layout: Layout, shapes: tuple[tuple[str, Shape], ...]) -> Plan:
    empty = tuple((path, shape) for path, shape in shapes if 0 in shape)
    parameters = {path: shape for path, shape in shapes if 0 not in shape}
    plain = plain_paths(path for path, _ in shapes)
    _require_matches(layout, list(plain.values()))
    layer_axes = {
        path: rules.layer_axes_of(layout.layer_axes, plain[path], shape) for path, shape in parameters.items()
    }
    of_a_layer = {path: without_axes(shape, layer_axes[path]) for path, shape in parameters.items()}
    reasons = _reasons_before_groups(layout, parameters, of_a_layer, plain)
    with_factors = {path: shape for path, shape in of_a_layer.items() if path not in reasons}
    assignments = assign(layout.group, with_factors, plain)
    if layout.diagonal is not None:
        alone = [assignment.name for assignment in assignments if assignment.rule is None]
        reasons |= {path: "a vector or scalar" for path in alone if _is_vector(of_a_layer[path])}
    units = tuple(
        _unit(layout, assignment, {path: (parameters[path], layer_axes[path]) for path in assignment.paths})
        for assignment in assignments
        if assignment.paths[0] not in reasons
    )
    stacks, flat = place([part for unit in units for part in unit.stacks])
    placements = iter(flat)
    plan = Plan(
        units=units,
        stacks=stacks,
        placements=tuple(tuple(next(placements) for _ in unit.stacks) for unit in units),
        rest=tuple(
            Rest(path, shape, reasons[path], layer_axes[path]) for path, shape in parameters.items() if path in reasons
        ),
        empty=empty,
    )
    names = collections.Counter(block.name for block in plan.blocks)
    if twice := [name for name, number in names.items() if number > 1]:
        raise ValueError(
            f"blocks must have distinct names, but two have {twice[0]!r}. Rename the parameter whose key path is the "
            "name of a block or group of another."
        )
    return plan


def _require_matches(layout: Layout, plain: list[str]) -> None:
    """Raises a ValueError for a pattern of the layout that is found in none of the plain paths."""
    for pattern in layout.layer_axes if isinstance(layout.layer_axes, Mapping) else ():
        require_match("a key of layer_axes", pattern, plain)
    if isinstance(layout.diagonal, str) and layout.diagonal != EMBEDDINGS:
        require_match("diagonal", layout.diagonal, plain)
    require_groups(layout.group, plain)


def _is_vector(shape: Shape) -> bool:
    return len(squeezed(shape)) == 1


def _reasons_before_groups(
    layout: Layout, parameters: Mapping[str, Shape], of_a_layer: Mapping[str, Shape], plain: Mapping[str, str]
) -> dict[str, str]:
    """Returns why parameters have no factors, by key path, as far as that does not depend on groups."""
    reasons = {}
    for path, shape in parameters.items():
        reason = rules.reason_without_factors(layout.diagonal, plain[path], shape)
        layer = of_a_layer[path]
        if reason is None and layout.diagonal is not None and not _is_vector(layer) and max(layer) > _LONGEST_AXIS:
            reason = f"an axis longer than {_LONGEST_AXIS:,}"
        if reason is not None:
            reasons[path] = reason
    return reasons


def _unit(layout: Layout, assignment: Assignment, members: dict[str, tuple[Shape, tuple[int, ...]]]) -> Unit:
    name, plain, paths, rule = assignment
    layer_shape = _layer_shape(members)
    of_a_layer = {path: without_axes(*member) for path, member in members.items()}
    tensor_shape = of_a_layer[paths[0]] if rule is None else joined_shape(rule, of_a_layer)
    axes = squeezed(tensor_shape)
    lengths = axes if layout.merge_dims is None else merged(axes, layout.merge_dims)
    factories = rules.structures_of(layout.structure, plain, lengths)
    if factories is None:
        factories = _default_structures(layout, lengths, is_vector=len(axes) == 1)
    for factory, length in zip(factories, lengths, strict=True):
        if not isinstance(structure := factory(length), Structure) or structure.dim != length:
            raise ValueError(f"structure must make a structure of {length} rows at {name!r}, got {structure!r}.")
    cuts = tuple(_cut(layout, factory, length) for factory, length in zip(factories, lengths, strict=True))
    factor_dtypes = _factor_dtypes(layout, name, len(lengths))
    return Unit(
        name=name,
        paths=paths,
        shapes=tuple(shape for shape, _ in members.values()),
        layer_axes=tuple(axes for _, axes in members.values()),
        rule=rule,
        layer_shape=layer_shape,
        tensor_shape=tensor_shape,
        lengths=lengths,
        cuts=cuts,
        stacks=stacks_of(factories, factor_dtypes, cuts, layer_shape),
    )


def _layer_shape(members: dict[str, tuple[Shape, tuple[int, ...]]]) -> Shape:
    """Returns the lengths of the layer axes, after checking that all members of a group have the same."""
    layer_shapes = {path: tuple(shape[axis] for axis in axes) for path, (shape, axes) in members.items()}
    if len(set(layer_shapes.values())) > 1:
        shapes = {path: shape for path, (shape, _) in members.items()}
        raise ValueError(
            f"parameters of one group must have the same layer axes, but layer_axes gives {layer_shapes} in {shapes}."
        )
    return next(iter(layer_shapes.values()))


def _default_structures(layout: Layout, lengths: Shape, *, is_vector: bool) -> tuple[StructureFactory, ...]:
    if is_vector:
        return (diagonal,) * len(lengths)
    return tuple(dense if _piece(length, layout.block_size) <= layout.max_dense_dim else diagonal for length in lengths)


def _factor_dtypes(layout: Layout, name: str, axes: int) -> tuple[jnp.dtype | None, ...]:
    try:
        return rules.factor_dtypes_of(layout.factor_dtype, axes)
    except ValueError as error:
        raise ValueError(f"{error} The block is of {name!r}.") from None


def _cut(layout: Layout, factory: StructureFactory, length: int) -> Cut:
    """Returns how an axis is cut: a last block of a few entries would have a factor of its own for next to nothing."""
    if factory(length) == diagonal(length):
        return Cut(length, length)
    return Cut(length, _piece(length, layout.block_size))


def _piece(length: int, block_size: int | None) -> int:
    """Returns the length of all blocks of an axis but the last: as few as possible, and as equal."""
    blocks = 1 if block_size is None else math.ceil(length / block_size)
    return math.ceil(length / blocks)

"""A layout: the user's choices of how parameters become blocks."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.sharding import NamedSharding, PartitionSpec

from rootfree_optax._src.common import trees
from rootfree_optax._src.common.meshes import Spec
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.common.validate import whole_number
from rootfree_optax._src.layout import rules
from rootfree_optax._src.layout.group import Assignment, Group, assign, join_shapes, require_groups
from rootfree_optax._src.layout.paths import EMBEDDINGS, plain_paths, require_match
from rootfree_optax._src.layout.plan import Plan, Rest
from rootfree_optax._src.layout.shards import (
    AUTO_BLOCK_SIZE,
    carriers,
    carry,
    count_shards,
    even_piece,
    keep_nested,
    nested_pieces,
    read_specs,
    shards_of,
)
from rootfree_optax._src.layout.split import Cut
from rootfree_optax._src.layout.stack import place
from rootfree_optax._src.layout.unit import Unit, make_stacks, merge, squeeze, without_axes
from rootfree_optax._src.structures.base import Structure
from rootfree_optax._src.structures.names import StructureFactory, dense, diagonal

# A longer axis is that of a vocabulary, whose rows are updated one by one.
_LONGEST_AXIS = 32_768


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters become blocks with one factor per axis, decided from key paths and shapes alone.

    The steps, in this order:

    1. Axes that index layers are set apart (`layer_axes`), and parameters without factors are put aside (`diagonal`).
    2. The rules of `group` join or reshape parameters.
    3. Axes of length one are dropped, and small neighbouring axes are merged (`merge_dims`).
    4. Each axis gets a structure (`structure`), and long axes are cut into blocks (`block_size`).
    5. All blocks of the tree with one shape, one structure per axis and one dtype per factor form one stack.

    Regular expressions and callables see the same key path in every framework: without a leading 'params/', and without
    a trailing '/value' or '/array' that only boxes one array. A regular expression that matches no parameter is an
    error. `optax.masked` and `optax.partition` show each inner optimizer its own parameters only, so give each of them
    a layout with patterns for those. An empty tree matches every pattern.

    Args:
      structure: the structure of the factors. Axes are counted per layer, after squeezing and merging.
        None: `dense` for axes of at most `max_dense_dim`, else `diagonal`; always `diagonal` for vectors.
        A name: the same structure for every axis of every parameter.
        A tuple: one name for each axis.
        A mapping: from the number of axes to a name or a tuple.
        A callable: from the key path and the shape to a name, a tuple, or None for the default.
        In a tuple, in a mapping, or from a callable, a name may be replaced by a factory, which takes the number of
        rows and returns a `Structure`.
      max_dense_dim: the longest dense axis under the default rule, at least 1. If `block_size` cuts an axis, the length
        of its blocks counts. Explicit structures ignore this bound.
      block_size: the maximal length of a block, at least 1. A longer axis is cut into as few blocks as possible, all of
        one length, a multiple of 16 where that fits, except for a shorter last one: with 256, an axis of 512 is cut
        into 256 + 256, one of 257 into 144 + 113. Axes with a diagonal structure are not cut. None: no axis is cut,
        and one that is longer than `max_dense_dim` becomes diagonal by default. "auto": 512; but a parameter whose
        shards are known (`specs`) is cut so that blocks and shards nest, into blocks of 128 to 512 of which each device
        gets equally many. Then cuts, and so the training, depend on the mesh; a number pins them.
      merge_dims: neighbouring axes but the last are merged, from the left, while their product is at most this: by
        default a 3×3 kernel's window becomes one axis of 9. None: no merging.
      layer_axes: which axes index independent layers (`nn.scan`, `nnx.scan`, vmapped layers, experts).
        None: no axis.
        An integer: the position of one axis, in every parameter. 0 is the first axis, 1 the second (as MaxText's
        `param_scan_axis=1`), -1 the last.
        A tuple: the positions of several axes, in every parameter, such as layers and experts.
        A mapping: from regular expressions to an integer, a tuple or None. The first expression found in the key path
        decides. Parameters without a match have no layer axes.
        A callable: from the key path and the shape to an integer, a tuple or None.
        A position outside a parameter's axes is an error.
      diagonal: which parameters have no Kronecker factors.
        A regular expression: parameters with a match in their key path, by default `EMBEDDINGS`.
        None: every parameter has factors.
        A callable: from the key path and the shape to a bool.
        Unless it is None, two more kinds have no factors, not counting layer axes: vectors and scalars, that is
        parameters with at most one axis longer than 1, unless a rule of `group` applies to them; and parameters with
        two or more such axes of which one is longer than 32,768. `Plan.rest` lists them, each with the reason.
      group: rules that join or reshape parameters, such as `weight_and_bias()`. The first that applies wins.
      factor_dtype: the dtype of the factors, real floating point of at least 16 bits.
        None: the widest dtype among the stack's parameters.
        A dtype: the same for every factor.
        A tuple: one dtype for each axis, or None for the default.
        A mapping: from a block's number of axes to a dtype or a tuple. Other blocks have the default.
      specs: how the parameters are sharded: a tree like them of `PartitionSpec`s, of `NamedSharding`s, or of arrays or
        shapes that have one. Where stacks are divided (`mesh_axes`), a block then belongs to one of the devices that
        hold a part of it, and an update exchanges gradients and directions among these alone, once each. None: what
        the parameters' types say on explicit mesh axes. On others a traced array shows nothing, and without specs the
        compiler decides what is sent, up to hundreds of times as much. `PartitionSpec`s need `jax.set_mesh`; the others
        tell the mesh, where neither that nor the arrays do.

    Raises:
      ValueError: for a number out of range, an unknown structure or an invalid regular expression.
      TypeError: for an argument of any other type.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"kernel": jnp.zeros((768, 256)), "bias": jnp.zeros(256)}
      >>> plan = rf.Layout(block_size=256).plan(params)
      >>> [(stack.count, stack.shape) for stack in plan.stacks]
      [(3, (256, 256))]
      >>> [block.name for block in plan.blocks]
      ['kernel[0, 0]', 'kernel[1, 0]', 'kernel[2, 0]']
      >>> [(parameter.path, parameter.reason) for parameter in plan.rest]
      [('bias', 'a vector or scalar')]
    """

    structure: rules.StructureRule = None
    max_dense_dim: int = 2048
    block_size: int | Literal["auto"] | None = "auto"
    merge_dims: int | None = 32
    layer_axes: rules.LayerRule = None
    diagonal: rules.DiagonalRule = EMBEDDINGS
    group: tuple[Group, ...] = ()
    factor_dtype: rules.DTypeRule = None
    specs: Any = None

    def __post_init__(self) -> None:
        """Checks the arguments and makes mappings and lists immutable."""
        for name in ("structure", "layer_axes", "group", "factor_dtype"):
            object.__setattr__(self, name, rules.freeze(getattr(self, name)))
        object.__setattr__(self, "specs", read_specs(self.specs))
        rules.require_structure_rule(self.structure)
        rules.require_layer_rule(self.layer_axes)
        rules.require_diagonal_rule(self.diagonal)
        rules.require_dtype_rule(self.factor_dtype)
        for name in ("max_dense_dim", "block_size", "merge_dims"):
            value = getattr(self, name)
            if (value is None and name != "max_dense_dim") or (value == "auto" and name == "block_size"):
                continue
            object.__setattr__(self, name, whole_number(name, value))
        if not isinstance(self.group, tuple) or not all(isinstance(rule, Group) for rule in self.group):
            raise TypeError(f"group must be a tuple of Group rules, got {self.group!r}.")

    @property
    def shardings(self) -> tuple[NamedSharding | PartitionSpec, ...]:
        """The values of `specs`: they tell the mesh, unless they are `PartitionSpec`s."""
        return () if self.specs is None else tuple(sharding for _, sharding in self.specs.pairs)

    def plan(self, params: Any, gradients: Any = None) -> Plan:
        """Returns the plan of a tree of parameters, without any computation; cached by key paths and shapes.

        Args:
          params: a tree of arrays, `jax.ShapeDtypeStruct`s or tracers. None stands for no parameter.
          gradients: a tree like the parameters. What is no floating-point array and has no gradient is no parameter.

        Returns:
          The plan.

        Raises:
          TypeError: for a parameter that is not real floating point.
          ValueError: for a rule that does not fit a parameter, a regular expression that matches none, or two
            parameters with the same key path. The message names the key path, or the nearest ones.
        """
        shapes = trees.real_shapes(params, gradients)
        specs, sizes = shards_of(self.specs, params, dict(shapes))
        return _plan(self, shapes, tuple(specs.items()), tuple(sizes.items()))


class _Parameter(NamedTuple):
    """A parameter with entries: its key path, the same as patterns see it, its shape, its layer axes and its spec."""

    path: str
    plain: str
    shape: Shape
    layer_axes: tuple[int, ...]
    spec: Spec

    @property
    def tensor_shape(self) -> Shape:
        """The shape of one layer."""
        return without_axes(self.shape, self.layer_axes)


@functools.lru_cache(maxsize=128)
def _plan(
    layout: Layout,
    shapes: tuple[tuple[str, Shape], ...],
    specs: tuple[tuple[str, Spec], ...],
    mesh_sizes: tuple[tuple[str, int], ...],
) -> Plan:
    plain = plain_paths(path for path, _ in shapes)
    _require_matches(layout, list(plain.values()))
    told = dict(specs)
    parameters = {
        path: _Parameter(
            path,
            plain[path],
            shape,
            rules.layer_axes_of(layout.layer_axes, plain[path], shape),
            told.get(path, ((),) * len(shape)),
        )
        for path, shape in shapes
        if 0 not in shape
    }
    reasons = {path: reason for path, parameter in parameters.items() if (reason := _reason(layout, parameter))}
    tensor_shapes = {path: parameter.tensor_shape for path, parameter in parameters.items() if path not in reasons}
    assignments = assign(layout.group, tensor_shapes, plain)
    if layout.diagonal is not None:
        alone = [assignment.name for assignment in assignments if assignment.rule is None]
        reasons |= {path: "a vector or scalar" for path in alone if _is_vector(tensor_shapes[path])}
    sizes = dict(mesh_sizes)
    alike = collections.Counter((parameters[path].shape, parameters[path].spec) for path in tensor_shapes)
    units = tuple(
        _unit(layout, assignment, [parameters[path] for path in assignment.paths], sizes, alike)
        for assignment in assignments
        if assignment.name not in reasons
    )
    stacks, flat = place([part for unit in units for part in unit.stacks])
    placements = iter(flat)
    plan = Plan(
        units=units,
        stacks=stacks,
        placements=tuple(tuple(next(placements) for _ in unit.stacks) for unit in units),
        rest=tuple(
            Rest(path, plain[path], parameter.shape, reasons[path])
            for path, parameter in parameters.items()
            if path in reasons
        ),
        empty=tuple((path, shape) for path, shape in shapes if 0 in shape),
    )
    names = collections.Counter(block.name for block in plan.blocks)
    if twice := [name for name, number in names.items() if number > 1]:
        raise ValueError(
            f"blocks must have distinct names, but two are called {twice[0]!r}. Rename the parameter whose key path "
            "equals the name of another parameter's block or group."
        )
    return plan


def _require_matches(layout: Layout, plain: Sequence[str]) -> None:
    """Raises a ValueError for a pattern of the layout that matches none of the plain key paths."""
    for pattern in layout.layer_axes if isinstance(layout.layer_axes, Mapping) else ():
        require_match("a key of layer_axes", pattern, plain)
    # The ready-made pattern fits models with and without embeddings.
    if isinstance(layout.diagonal, str) and layout.diagonal != EMBEDDINGS:
        require_match("diagonal", layout.diagonal, plain)
    require_groups(layout.group, plain)


def _is_vector(shape: Shape) -> bool:
    return len(squeeze(shape)) == 1


def _reason(layout: Layout, parameter: _Parameter) -> str | None:
    """Returns why a parameter has no factors whatever the groups are, or None if it may have some."""
    if layout.diagonal is None:
        return None
    if reason := rules.reason_without_factors(layout.diagonal, parameter.plain, parameter.shape):
        return reason
    shape = parameter.tensor_shape
    is_long = not _is_vector(shape) and max(shape) > _LONGEST_AXIS
    return f"an axis longer than {_LONGEST_AXIS:,}" if is_long else None


def _unit(
    layout: Layout,
    assignment: Assignment,
    members: Sequence[_Parameter],
    mesh_sizes: Mapping[str, int],
    alike: Mapping[tuple[Shape, Spec], int],
) -> Unit:
    layer_shape = _layer_shape(members)
    tensor_shape = members[0].tensor_shape
    if assignment.rule is not None:
        tensor_shape = join_shapes(assignment.rule, {member.path: member.tensor_shape for member in members})
    squeezed = squeeze(tensor_shape)
    lengths = squeezed if layout.merge_dims is None else merge(squeezed, layout.merge_dims)
    chosen = rules.structures_of(layout.structure, assignment.plain, lengths)
    factories = chosen or _default_structures(layout, lengths, is_vector=len(squeezed) == 1)
    for factory, length in zip(factories, lengths, strict=True):
        if not isinstance(structure := factory(length), Structure) or structure.dim != length:
            raise ValueError(
                f"structure must return a structure of {length} rows for {assignment.name!r}, got {structure!r}."
            )
    first = members[0]
    spec: Spec = ((),) * (len(layer_shape) + len(lengths))
    if assignment.rule is None or assignment.rule.keeps_order:
        carried = carriers(first.shape, first.layer_axes, lengths)
        spec = carry(first.spec, carried, (*layer_shape, *lengths), mesh_sizes)
    pieces = _pieces(layout, factories, layer_shape, lengths, spec, mesh_sizes, alike[first.shape, first.spec])
    cuts = tuple(map(Cut, lengths, pieces))
    factor_dtypes = rules.factor_dtypes_of(layout.factor_dtype, assignment.name, len(lengths))
    return Unit(
        name=assignment.name,
        paths=assignment.paths,
        shapes=tuple(member.shape for member in members),
        layer_axes=tuple(member.layer_axes for member in members),
        rule=assignment.rule,
        layer_shape=layer_shape,
        tensor_shape=tensor_shape,
        lengths=lengths,
        cuts=cuts,
        stacks=make_stacks(factories, factor_dtypes, cuts, layer_shape),
        spec=keep_nested(spec, (*layer_shape, *lengths), (*(1 for _ in layer_shape), *pieces), mesh_sizes),
    )


def _layer_shape(members: Sequence[_Parameter]) -> Shape:
    """Returns the lengths of the layer axes, after checking that all members of a group agree."""
    layer_shapes = {member.path: tuple(member.shape[axis] for axis in member.layer_axes) for member in members}
    if len(set(layer_shapes.values())) > 1:
        shapes = {member.path: member.shape for member in members}
        raise ValueError(
            f"parameters of one group must have the same layer axes, but layer_axes gives {layer_shapes} for the "
            f"shapes {shapes}."
        )
    return layer_shapes[members[0].path]


def _default_structures(layout: Layout, lengths: Shape, *, is_vector: bool) -> tuple[StructureFactory, ...]:
    if is_vector:
        return (diagonal,) * len(lengths)
    is_dense = lambda length: even_piece(length, _bound(layout)) <= layout.max_dense_dim
    return tuple(dense if is_dense(length) else diagonal for length in lengths)


def _bound(layout: Layout) -> int | None:
    return AUTO_BLOCK_SIZE if layout.block_size == "auto" else layout.block_size


def _pieces(
    layout: Layout,
    factories: Sequence[StructureFactory],
    layer_shape: Shape,
    lengths: Shape,
    spec: Spec,
    mesh_sizes: Mapping[str, int],
    alike: int,
) -> Shape:
    """Returns the lengths of a unit's blocks; `alike` units are of its shape and sharded as it is."""
    whole = [factory(length) == diagonal(length) for factory, length in zip(factories, lengths, strict=True)]
    shards = [count_shards(names, mesh_sizes) for names in spec]
    if layout.block_size == "auto" and math.prod(shards) > 1:
        layers = len(layer_shape)
        tensors = alike * math.prod(layer_shape) // math.prod(shards[:layers])
        others = math.prod(mesh_sizes.values()) // math.prod(shards)
        return nested_pieces(lengths, shards[layers:], whole, tensors, others)
    bound = _bound(layout)
    return tuple(n if is_whole else even_piece(n, bound) for n, is_whole in zip(lengths, whole, strict=True))

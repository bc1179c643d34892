"""A plan: how the parameters of one model become stacks of blocks, as static data."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rootfree_optax._src.common import trees
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout.paths import plain_paths
from rootfree_optax._src.layout.split import RelayoutFn
from rootfree_optax._src.layout.stack import Placement, Stack, opaque, stack, unstack
from rootfree_optax._src.layout.unit import Unit, no_relayout


@dataclasses.dataclass(frozen=True)
class Block:
    """A tensor with one factor for each of its axes.

    Args:
      name: the key path, followed by an index if the parameter has several blocks: 'dense/kernel[0, 1]' for a block
        along the axes, 'layers/kernel[3]' for a layer, 'layers/kernel[3; 0, 1]' for a block of a layer.
      parameter: the key path.
      layer: the index along the layer axes.
      index: the index along the other axes, in blocks.
      stack: the index of the stack.
      position: the position in the stack.
    """

    name: str
    parameter: str
    layer: Shape
    index: Shape
    stack: int
    position: int


@dataclasses.dataclass(frozen=True)
class Rest:
    """A parameter without factors, see `Layout.diagonal`.

    Args:
      path: the key path.
      name: the key path as patterns see it, the same with and without a framework's boxes.
      shape: the shape.
      reason: why the parameter has no factors, such as "'embed' in its key path".
    """

    path: str
    name: str
    shape: Shape
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a tree of parameters becomes stacks of blocks: static, hashable and small. Made by `Layout.plan`.

    Args:
      units: the parameters and groups.
      stacks: the stacks.
      placements: for each unit, the places of its blocks in the stacks.
      rest: the parameters without factors. They are in no stack.
      empty: the key paths and shapes of parameters without entries. They have no blocks.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"kernel": jnp.zeros((4, 6))}
      >>> plan = rf.Layout(block_size=3, factor_dtype=jnp.bfloat16).plan(params)
      >>> [block.name for block in plan.blocks]
      ['kernel[0, 0]', 'kernel[0, 1]', 'kernel[1, 0]', 'kernel[1, 1]']
      >>> [(stack.count, stack.shape) for stack in plan.stacks]
      [(4, (2, 3))]
    """

    units: tuple[Unit, ...]
    stacks: tuple[Stack, ...]
    placements: tuple[tuple[Placement, ...], ...]
    rest: tuple[Rest, ...] = ()
    empty: tuple[tuple[str, Shape], ...] = ()

    def pack(self, tree: Any, name: str = "gradients", relayout: RelayoutFn = no_relayout) -> tuple[jax.Array, ...]:
        """Packs a tree like the parameters into stacks.

        Args:
          tree: arrays of the parameters' shapes. None, for a parameter without a gradient, becomes −∞. Parameters
            without factors (`rest`) are skipped.
          name: the tree's name in an error message.
          relayout: reshards arrays on their way to blocks, see `Unit.to_blocks`.

        Returns:
          One array [count, *shape] for each stack, with the widest dtype among its parameters.

        Raises:
          ValueError: for a tree unlike the parameters, or a group with gradients for some of its parameters only. The
            message names the key path.
        """
        leaves = self.named_leaves(tree, name)
        pieces: list[jax.Array | None] = []
        for unit in self.units:
            arrays = [leaves[path] for path in unit.paths]
            if missing := [path for path, array in zip(unit.paths, arrays, strict=True) if array is None]:
                if len(missing) < len(arrays):
                    raise ValueError(
                        f"{name} must have arrays for all parameters of the group {unit.name!r} or for none, got "
                        f"None at {missing[0]!r}. Remove it from the group, or pass zeros."
                    )
                pieces += [None] * len(unit.stacks)
            else:
                pieces += unit.to_blocks(arrays, relayout)
        return stack(pieces, self._flat_placements, self.stacks)

    def unpack(
        self,
        stacks: Sequence[jax.Array],
        like: Any,
        *,
        rest: Mapping[str, jax.Array] | None = None,
        equal_kernels: bool = False,
    ) -> Any:
        """Unpacks stacks into a tree like the parameters: the inverse of `pack`.

        Args:
          stacks: one array [count, *shape] for each stack.
          like: the tree that was packed.
          rest: one array for each parameter without factors, by key path. Required if `self.rest` has parameters that
            are not None in `like`.
          equal_kernels: whether parameters of one shape share one compiled kernel, see `opaque`. For stacks that are
            whole on every device.

        Returns:
          A tree with the dtypes of `like`, and None where `like` has None.

        Raises:
          ValueError: for stacks, a tree or a `rest` unlike the plan's.
        """
        shapes = [array.shape for array in stacks]
        expected = [(target.count, *target.shape) for target in self.stacks]
        if shapes != expected:
            raise ValueError(f"stacks must have the shapes {expected}, got {shapes}.")
        leaves = self.named_leaves(like, "the tree to unpack like")
        arrays: dict[str, jax.Array] = {}
        starts = {place.start for place in self._flat_placements if place.count < self.stacks[place.stack].count}
        numbers = opaque({0, *starts}, stacks[0]) if equal_kernels and starts else None
        for unit, places in zip(self.units, self.placements, strict=True):
            if [path for path in unit.paths if leaves[path] is not None]:
                arrays |= zip(unit.paths, unit.from_blocks(unstack(stacks, places, numbers)), strict=True)
        return self.assemble(arrays, like, rest)

    def assemble(self, arrays: Mapping[str, Any], like: Any, rest: Mapping[str, Any] | None) -> Any:
        """Returns a tree like the parameters.

        Args:
          arrays: those with factors, by key path.
          like: see `unpack`, as `rest`.
          rest: those without factors.
        """
        leaves = trees.named_leaves(like)
        arrays = {**arrays, **{path: jnp.zeros(shape) for path, shape in self.empty}}
        if self.rest or rest:
            arrays |= self._require_rest(rest or {}, leaves)
        results = [None if leaf is None else arrays[path].astype(leaf.dtype) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like, is_leaf=trees.is_none), results)

    @functools.cached_property
    def summary(self) -> str:
        """What decides where blocks are and what they keep: JSON, by unit and parameter, with the names of `Layout`.

        The units come in the order of their blocks, with a number and a shape of blocks for each of their stacks.
        """
        units: dict[str, dict[str, Any]] = {unit.name: _summarize(unit) for unit in self.units}
        units |= {entry.path: {"shape": [entry.shape], "diagonal": True} for entry in self.rest}
        units |= {path: {"shape": [shape]} for path, shape in self.empty}
        names = plain_paths(units, prefix="")  # frameworks box parameters in `init` and not in `update`, as nnx does
        return json.dumps({names[path]: unit for path, unit in units.items()})

    def named_leaves(self, tree: Any, name: str, *, sample_axis: bool = False) -> dict[str, Any]:
        """Returns the leaves by key path, after checking their paths and shapes; for the arguments see `pack`."""
        leaves = trees.named_leaves(tree)
        # None elsewhere stands for no parameter.
        relevant = {path: leaf for path, leaf in leaves.items() if leaf is not None or path in self._shapes}
        trees.require_shapes(relevant, self._shapes, name=name, sample_axis=sample_axis, kind=jnp.floating)
        return leaves

    def _require_rest(self, arrays: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arrays of `rest` for the leaves that are not None, after checking paths and shapes."""
        expected = {entry.path: entry.shape for entry in self.rest if leaves[entry.path] is not None}
        found = {path: array for path, array in arrays.items() if leaves.get(path, array) is not None}
        trees.require_shapes(found, expected, name="rest, of the parameters without factors,")
        return found

    @functools.cached_property
    def _shapes(self) -> dict[str, Shape]:
        shapes = dict(self.empty) | {entry.path: entry.shape for entry in self.rest}
        for unit in self.units:
            shapes |= zip(unit.paths, unit.shapes, strict=True)
        return shapes

    @functools.cached_property
    def _flat_placements(self) -> list[Placement]:
        return [place for places in self.placements for place in places]

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, ordered by parameter, shape, layer and index."""
        return tuple(
            Block(unit.name + _suffix(unit, layer, index), unit.name, layer, index, place.stack, place.start + offset)
            for unit, places in zip(self.units, self.placements, strict=True)
            for place, indices in zip(places, unit.block_indices(), strict=True)
            for offset, (layer, index) in enumerate(indices)
        )


def _summarize(unit: Unit) -> dict[str, Any]:
    join = None if unit.rule is None else unit.rule.join
    return {
        "shape": unit.shapes,
        "diagonal": False,
        "layer_axes": unit.layer_axes,
        "group": getattr(join, "__qualname__", repr(join)),
        "merge_dims": unit.lengths,
        "structure": [[structure.name for structure in stack.structures] for stack in unit.stacks],
        "block_size": [[stack.count, stack.shape] for stack in unit.stacks],
        "factor_dtype": [dtype and dtype.name for dtype in unit.stacks[0].factor_dtypes],
    }


def _suffix(unit: Unit, layer: Shape, index: Shape) -> str:
    """Returns the index in a block's name, or an empty string for the only block of a parameter."""
    indices = [", ".join(map(str, part)) for part, shown in ((layer, bool(layer)), (index, unit.is_cut)) if shown]
    return f"[{'; '.join(indices)}]" if indices else ""

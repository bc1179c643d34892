"""A plan: how the parameters of one model become stacks of blocks, as plain static data."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rootfree_optax._src.common import trees
from rootfree_optax._src.layout.axes import Shape
from rootfree_optax._src.layout.split import Placed, as_it_is
from rootfree_optax._src.layout.stack import Placement, Stack, opaque, stack, unstack
from rootfree_optax._src.layout.unit import Unit


@dataclasses.dataclass(frozen=True)
class Block:
    """One block: the tensor that has a factor for each of its axes.

    Args:
      name: the key path, with the block's index if there are several: 'dense/kernel[0, 1]' for a block along the
        axes, 'layers/kernel[3]' for a layer, 'layers/kernel[3; 0, 1]' for a block of a layer.
      parameter: the key path alone.
      layer: the index along the layer axes.
      index: the index along the axes, counted in blocks.
      stack: which stack holds it.
      position: where in that stack.
    """

    name: str
    parameter: str
    layer: Shape
    index: Shape
    stack: int
    position: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a tree of parameters becomes stacks of blocks. `Layout.plan` makes it; it is static, hashable, and small.

    Args:
      units: the parameters and groups.
      stacks: the stacks.
      placements: for each unit, where in the stacks its blocks stand.
      empty: key paths and shapes of the parameters without entries, which have no blocks.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"kernel": jnp.zeros((4, 6))}
      >>> plan = rf.Layout(block_size=3).plan(params)
      >>> [block.name for block in plan.blocks]
      ['kernel[0, 0]', 'kernel[0, 1]', 'kernel[1, 0]', 'kernel[1, 1]']
      >>> [(stack.count, stack.shape) for stack in plan.stacks]
      [(2, (3, 3)), (2, (1, 3))]
    """

    units: tuple[Unit, ...]
    stacks: tuple[Stack, ...]
    placements: tuple[tuple[Placement, ...], ...]
    empty: tuple[tuple[str, Shape], ...] = ()

    def pack(self, tree: Any, name: str = "gradients", placed: Placed = as_it_is) -> tuple[jax.Array, ...]:
        """Returns the blocks of a tree like the parameters, one array [count, *shape] for each stack.

        The dtype of a stack is the widest among its members'. A parameter without a gradient (None) becomes NaN.

        Args:
          tree: arrays of the parameters' shapes.
          name: what the tree is called in an error.
          placed: what is done to arrays on their way to blocks, see `split`.

        Raises:
          ValueError: for a tree unlike the parameters, or a group of which some parameters have a gradient and others
            have none. It names the key path.
        """
        leaves = trees.named_leaves(tree)
        self._require_like_parameters(leaves, name)
        pieces: list[jax.Array | None] = []
        for unit in self.units:
            arrays = [leaves[path] for path in unit.paths]
            if missing := [path for path, array in zip(unit.paths, arrays, strict=True) if array is None]:
                if len(missing) < len(arrays):
                    raise ValueError(
                        f"{name} must have an array for all parameters of the group {unit.name!r} or for none, got "
                        f"None at {missing[0]!r}. Take it out of the group, or pass zeros."
                    )
                pieces += [None] * len(unit.stacks)
            else:
                pieces += unit.to_blocks(arrays, placed)
        return stack(pieces, [place for places in self.placements for place in places], self.stacks)

    def unpack(
        self, stacks: Sequence[jax.Array], like: Any, placed: Placed = as_it_is, *, equal_kernels: bool = False
    ) -> Any:
        """Returns the tree whose blocks are given: the inverse of `pack`.

        Args:
          stacks: [count, *shape] for each stack.
          like: the tree that was packed. Each array gets the dtype of its leaf; None stays None.
          placed: what is done to arrays on their way from blocks, see `split`.
          equal_kernels: whether the program hides where in a stack each parameter's blocks begin, so that parameters of
            one shape get one kernel, compiled once; for stacks that every device has whole.

        Raises:
          ValueError: for stacks or a tree unlike the plan's.
        """
        shapes = [array.shape for array in stacks]
        expected = [(target.count, *target.shape) for target in self.stacks]
        if shapes != expected:
            raise ValueError(f"stacks must have the shapes {expected}, got {shapes}.")
        leaves = trees.named_leaves(like)
        self._require_like_parameters(leaves, "the tree to unpack like")
        arrays = {path: jnp.zeros(shape) for path, shape in self.empty}
        starts = (place.start for places in self.placements for place in places)
        numbers = opaque((0, *starts), stacks[0]) if equal_kernels and stacks else None
        for unit, places in zip(self.units, self.placements, strict=True):
            if any(leaves[path] is not None for path in unit.paths):
                arrays |= zip(unit.paths, unit.from_blocks(unstack(stacks, places, numbers), placed), strict=True)
        results = [None if leaf is None else arrays[path].astype(leaf.dtype) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like, is_leaf=lambda leaf: leaf is None), results)

    def _require_like_parameters(self, leaves: dict[str, Any], name: str) -> None:
        parameters = self._parameters
        relevant = {path: leaf for path, leaf in leaves.items() if leaf is not None or path in parameters}
        trees.require_like(relevant, parameters, name=name)

    @functools.cached_property
    def _parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = dict(self.empty)
        for unit in self.units:
            shapes |= zip(unit.paths, unit.shapes, strict=True)
        return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks: by parameter, then shape, then layer, then index along the axes."""
        return tuple(
            Block(unit.name + _suffix(unit, layer, index), unit.name, layer, index, place.stack, place.start + offset)
            for unit, places in zip(self.units, self.placements, strict=True)
            for place, indices in zip(places, unit.block_indices(), strict=True)
            for offset, (layer, index) in enumerate(indices)
        )


def _suffix(unit: Unit, layer: Shape, index: Shape) -> str:
    """Returns a block's index as its name shows it, nothing for the only block of a parameter."""
    cut = any(cut.piece < cut.length for cut in unit.cuts)
    indices = [", ".join(map(str, part)) for part, shown in ((layer, bool(layer)), (index, cut)) if shown]
    return f"[{'; '.join(indices)}]" if indices else ""

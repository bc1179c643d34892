"""A plan: how the parameters of one model become stacks of blocks, as plain static data."""

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rootfree_optax._src.common import trees
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout import table
from rootfree_optax._src.layout.factors import dense_factors, find_factors
from rootfree_optax._src.layout.split import RelayoutFn
from rootfree_optax._src.layout.stack import Placement, Stack, opaque, stack, unstack
from rootfree_optax._src.layout.unit import Unit, no_relayout


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
class Rest:
    """A parameter without factors, see `Layout.diagonal`.

    Args:
      path: the key path.
      shape: the parameter's shape.
      reason: why it has no factors, as in "'embed' in its key path".
      layer_axes: the positions of its layer axes.
    """

    path: str
    shape: Shape
    reason: str
    layer_axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a tree of parameters becomes stacks of blocks. `Layout.plan` makes it; it is static, hashable, and small.

    Args:
      units: the parameters and groups.
      stacks: the stacks.
      placements: for each unit, where in the stacks its blocks stand.
      rest: the parameters without factors, which are in no stack.
      empty: key paths and shapes of the parameters without entries, which have no blocks.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"kernel": jnp.zeros((4, 6))}
      >>> plan = rf.Layout(block_size=3, factor_dtype=jnp.bfloat16).plan(params)
      >>> [block.name for block in plan.blocks]
      ['kernel[0, 0]', 'kernel[0, 1]', 'kernel[1, 0]', 'kernel[1, 1]']
      >>> plan.state_bytes()
      104
      >>> state = rf.scale_by_sirf_shampoo(batch_size=1, layout=rf.Layout(block_size=3)).init(params)
      >>> [factor.shape for factor in plan.factors(state)["kernel[1, 1]"]]
      [(2, 2), (3, 3)]
    """

    units: tuple[Unit, ...]
    stacks: tuple[Stack, ...]
    placements: tuple[tuple[Placement, ...], ...]
    rest: tuple[Rest, ...] = ()
    empty: tuple[tuple[str, Shape], ...] = ()

    def pack(self, tree: Any, name: str = "gradients", relayout: RelayoutFn = no_relayout) -> tuple[jax.Array, ...]:
        """Returns the blocks of a tree like the parameters, one array [count, *shape] for each stack.

        The dtype of a stack is the widest among its members'. A parameter without a gradient (None) becomes NaN.
        Parameters without factors, those of `rest`, are in no stack.

        Args:
          tree: arrays of the parameters' shapes.
          name: what the tree is called in an error.
          relayout: moves arrays between devices on their way to blocks, see `Unit.to_blocks`.

        Raises:
          ValueError: for a tree unlike the parameters, or a group of which some parameters have a gradient and others
            have none. It names the key path.
        """
        leaves = self._named_leaves(tree, name)
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
                pieces += unit.to_blocks(arrays, relayout)
        return stack(pieces, self._flat_placements, self.stacks)

    def unpack(
        self,
        stacks: Sequence[jax.Array],
        like: Any,
        relayout: RelayoutFn = no_relayout,
        *,
        rest: Mapping[str, jax.Array] | None = None,
        equal_kernels: bool = False,
    ) -> Any:
        """Returns the tree whose blocks are given: the inverse of `pack`.

        Args:
          stacks: [count, *shape] for each stack.
          like: the tree that was packed. Each array gets the dtype of its leaf; None stays None.
          relayout: moves arrays between devices on their way from blocks, see `Unit.to_blocks`.
          rest: the arrays of the parameters without factors, by key path; may leave out those that are None in `like`.
          equal_kernels: whether the program hides where in a stack each parameter's blocks begin, so that parameters of
            one shape get one kernel, compiled once; for stacks that every device has whole.

        Raises:
          ValueError: for stacks or a tree unlike the plan's, or for a `rest` without one of its parameters.
        """
        shapes = [array.shape for array in stacks]
        expected = [(target.count, *target.shape) for target in self.stacks]
        if shapes != expected:
            raise ValueError(f"stacks must have the shapes {expected}, got {shapes}.")
        leaves = self._named_leaves(like, "the tree to unpack like")
        arrays = {path: jnp.zeros(shape) for path, shape in self.empty}
        if self.rest or rest:
            arrays |= self._require_rest(rest or {}, leaves)
        starts = {place.start for place in self._flat_placements if place.count < self.stacks[place.stack].count}
        numbers = opaque({0, *starts}, stacks[0]) if equal_kernels and starts else None
        for unit, places in zip(self.units, self.placements, strict=True):
            if any(leaves[path] is not None for path in unit.paths):
                arrays |= zip(unit.paths, unit.from_blocks(unstack(stacks, places, numbers), relayout), strict=True)
        results = [None if leaf is None else arrays[path].astype(leaf.dtype) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like, is_leaf=trees.is_none), results)

    def _named_leaves(self, tree: Any, name: str) -> dict[str, Any]:
        """Returns the leaves by key path, after checking that they are those of the parameters."""
        leaves = trees.named_leaves(tree)
        # The parameters may have None as well, where there is no parameter.
        relevant = {path: leaf for path, leaf in leaves.items() if leaf is not None or path in self._shapes}
        trees.require_shapes(relevant, self._shapes, name=name)
        return leaves

    def _require_rest(self, arrays: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arrays of the parameters without factors that have a gradient, after checking them."""
        expected = {entry.path: entry.shape for entry in self.rest if leaves[entry.path] is not None}
        if missing := expected.keys() - arrays.keys():
            raise ValueError(
                f"rest must have an array for each parameter without factors, but {min(missing)!r} is missing. "
                "Pass its update, or plan with Layout(diagonal=None)."
            )
        if unknown := arrays.keys() - {entry.path for entry in self.rest}:
            raise ValueError(f"rest must have parameters without factors only, but {min(unknown)!r} is not one.")
        found = {path: arrays[path] for path in expected}
        trees.require_shapes(found, expected, name="rest")
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
        """All blocks: by parameter, then shape, then layer, then index along the axes."""
        return tuple(
            Block(unit.name + _suffix(unit, layer, index), unit.name, layer, index, place.stack, place.start + offset)
            for unit, places in zip(self.units, self.placements, strict=True)
            for place, indices in zip(places, unit.block_indices(), strict=True)
            for offset, (layer, index) in enumerate(indices)
        )

    def factors(self, state: Any) -> dict[str, tuple[jax.Array, ...]]:
        """Returns the factors of every block as dense matrices, one [dₙ, dₙ] per axis, by the block's name.

        Args:
          state: the state of a Kronecker transformation that was initialised on the plan's parameters with its layout,
            or of a whole optimizer that contains it. Blocks beyond the plan's count as padding, so that a state of
            more parameters than the plan's is taken for one that is split over devices.

        Returns:
          {name: (K₁, …, K_N)}; a parameter of one block goes by its key path, see `Block` for the others.

        Raises:
          ValueError: if the state holds no factors of this plan's shapes, or those of several transformations.
        """
        found = find_factors(state, self.stacks)
        return {
            block.name: dense_factors(found[block.stack], self.stacks[block.stack], block.position)
            for block in self.blocks
        }

    def state_bytes(
        self,
        *,
        riemannian_momentum: bool = False,
        cached_products: bool = False,
        observed_curvature: bool = False,
    ) -> int:
        """Returns the bytes of all factors; a dtype of None counts as float32.

        Args:
          riemannian_momentum: whether each factor has a momentum, of its size and dtype.
          cached_products: whether each factor K has K Kᵀ beside it, of its size and dtype.
          observed_curvature: whether each factor has a sum beside it, as `curvature_every` keeps.
        """
        beside = {"riemannian_momentum": riemannian_momentum, "cached_products": cached_products}
        beside["observed_curvature"] = observed_curvature
        return sum(target.state_bytes(**beside) for target in self.stacks)

    def table(
        self,
        *,
        riemannian_momentum: bool = False,
        cached_products: bool = False,
        observed_curvature: bool = False,
        width: int | None = None,
    ) -> str:
        """Returns a table of each parameter's blocks, structures, bytes of state and floating-point operations.

        Parameters that differ only by numbers in their key paths share a line, with an asterisk for the number.

        Args:
          riemannian_momentum: whether each factor has a momentum.
          cached_products: whether each factor K has K Kᵀ beside it.
          observed_curvature: whether each factor has a sum beside it, as `curvature_every` keeps.
          width: of the page, in characters; None takes the terminal's. Long key paths are shortened to keep to it.
        """
        state_bytes = functools.partial(
            Stack.state_bytes,
            riemannian_momentum=riemannian_momentum,
            cached_products=cached_products,
            observed_curvature=observed_curvature,
        )
        width = shutil.get_terminal_size().columns if width is None else width
        return table.render(self.units, self.stacks, state_bytes=state_bytes, width=width)

    def __str__(self) -> str:
        """Returns the table for factors with nothing beside them."""
        return self.table()


def _suffix(unit: Unit, layer: Shape, index: Shape) -> str:
    """Returns a block's index as its name shows it, nothing for the only block of a parameter."""
    indices = [", ".join(map(str, part)) for part, shown in ((layer, bool(layer)), (index, unit.is_cut)) if shown]
    return f"[{'; '.join(indices)}]" if indices else ""

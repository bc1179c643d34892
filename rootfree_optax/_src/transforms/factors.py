"""Reading the factors out of an optimizer's state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout import Layout, Stack
from rootfree_optax._src.layout.stack import are_padded
from rootfree_optax._src.stacks.state import StackState
from rootfree_optax._src.transforms.kronecker import find_kronecker_states


def factors(
    state: Any,
    params: optax.Params,
    layout: Layout = Layout(),  # noqa: B008  # a frozen value
) -> dict[str, tuple[jax.Array, ...]]:
    """Returns the factors of every block as dense matrices, by the block's name.

    For SIRF-Shampoo these are the Kₙ, with KₙKₙᵀ ≈ Sₙ⁻¹, for RF-Shampoo the Sₙ. Of a rule of your own, they are what
    the block's state has as its attribute `factors`: for each axis the parts of a matrix.

    Args:
      state: the state of a Kronecker transformation, or any tree that holds exactly one, such as the state of a whole
        optimizer, or the inner state of `optax.partition` for one label.
      params: the parameters that the transformation was given: arrays or `jax.ShapeDtypeStruct`s, with None or
        `optax.MaskedNode()` for those that another transformation has. A state of more parameters than these is taken
        for one whose stacks are padded to a mesh.
      layout: the transformation's own.

    Returns:
      {name: (K₁, …, K_N)} with Kₙ [dₙ, dₙ]. A parameter of one block goes by its key path, one of several blocks by
      that and an index, as in 'dense/kernel[0, 1]'.

    Raises:
      ValueError: if the state holds no factors of these shapes, or those of several transformations.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"dense": {"kernel": jnp.zeros((4, 3))}}
      >>> state = rf.sirf_shampoo(1e-3).init(params)
      >>> {name: [k.shape for k in matrices] for name, matrices in rf.factors(state, params).items()}
      {'dense/kernel': [(4, 4), (3, 3)]}
    """
    plan = layout.plan(params)
    found = _find_factors(state, plan.stacks)
    return {
        block.name: _dense_factors(found[block.stack], plan.stacks[block.stack], block.position)
        for block in plan.blocks
    }


def _find_factors(state: Any, stacks: Sequence[Stack]) -> Sequence[StackState]:
    """Returns the state of each stack from anywhere in a state."""
    if not stacks:
        return []
    expected = [shape for stack in stacks for shape in stack.part_shapes]
    candidates = [node.stacks for node in find_kronecker_states(state) if isinstance(node.stacks, tuple)]
    factors_of = lambda stacks: [getattr(stack.block, "factors", None) for stack in stacks]
    shapes = [[part.shape for part in jax.tree.leaves(factors_of(candidate))] for candidate in candidates]
    pairs = list(zip(candidates, shapes, strict=True))
    exact = [candidate for candidate, found in pairs if found == expected]
    padded = [candidate for candidate, found in pairs if _may_hold(candidate, found, expected)]
    match exact or padded:
        case []:
            raise ValueError(
                "the state must hold the factors of one transformation of these parameters with this layout: arrays of "
                f"the shapes {expected}, got {shapes or 'no Kronecker transformation'}. Pass the layout that the "
                "transformation has, and the parameters that it was given."
            )
        case [found]:
            return found
        case several:
            raise ValueError(
                f"the state must hold one transformation with factors of the shapes {expected}, got {len(several)}. "
                "Pass the state of one of them, such as state.inner_states['label']."
            )


def _may_hold(stacks: Sequence[StackState], found: Sequence[Shape], expected: Sequence[Shape]) -> bool:
    """Returns whether shapes are the expected ones, but for padding along their first axes."""
    if [shape[1:] for shape in found] != [shape[1:] for shape in expected]:
        return False
    counts, lengths = [count for count, *_ in expected], [length for length, *_ in found]
    if any(stack.number is not None for stack in stacks):
        return all(length >= count for length, count in zip(lengths, counts, strict=True))
    return are_padded(counts, lengths)


def _dense_factors(state: StackState, stack: Stack, number: int) -> tuple[jax.Array, ...]:
    """Returns the dense matrix [dₙ, dₙ] of each axis of a stack's block of the given number."""
    row: Any = number
    if state.number is not None:
        row = jnp.argmax(_everywhere(state.number) == number)
        row = row if isinstance(row, jax.core.Tracer) else int(row)
    block = jax.tree.map(lambda part: _everywhere(part, row), state.block.factors)
    return tuple(structure.to_dense(parts) for structure, parts in zip(stack.structures, block, strict=True))


def _everywhere(part: jax.Array, row: Any = slice(None)) -> jax.Array:
    """Returns a row, or all of them, on every device."""
    sharding = jax.typeof(part).sharding
    if all(axis is None for axis in sharding.spec):
        return part[row]
    # A row of what carries a sharding in its type must be told where to go; one that is traced, after all have gone.
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return (
        part.at[row].get(out_sharding=everywhere)
        if isinstance(row, int)
        else jax.sharding.reshard(part, everywhere)[row]
    )

"""Reading the factors out of an optimizer's state."""

from collections.abc import Sequence
from typing import Any

import jax

from rootfree_optax._src.layout.stack import Stack, padded_lengths


def _has_factors(node: Any) -> bool:
    return hasattr(node, "factors")


def find_factors(state: Any, stacks: Sequence[Stack]) -> tuple[Any, ...]:
    """Returns the factors of the given stacks from anywhere in a state.

    Args:
      state: the state of a Kronecker transformation, or any tree that holds one, such as a whole optimizer's state.
      stacks: the stacks of the plan.

    Raises:
      ValueError: if the state holds no factors of these stacks, or several transformations' that could be.
    """
    if not stacks:
        return ()
    expected = [shape for stack in stacks for shape in stack.part_shapes]
    nodes = [node for node in jax.tree.leaves(state, is_leaf=_has_factors) if _has_factors(node)]
    found = [[part.shape for part in jax.tree.leaves(node.factors)] for node in nodes]
    exact = [node for node, shapes in zip(nodes, found, strict=True) if shapes == expected]
    padded = [node for node, shapes in zip(nodes, found, strict=True) if padded_lengths(stacks, shapes) is not None]
    match exact or padded:
        case []:
            raise ValueError(
                "the state must hold factors that were made with this layout for these parameters: arrays of the "
                f"shapes {expected}, got {found or 'none'}."
            )
        case [node]:
            return tuple(node.factors)
        case several:
            raise ValueError(
                f"the state must hold one transformation with factors of the shapes {expected}, got {len(several)}. "
                "Pass the state of one of them, such as state.inner_states['label']."
            )


def dense_factors(factors: Any, stack: Stack, position: int) -> tuple[jax.Array, ...]:
    """Returns the dense matrix [dₙ, dₙ] of each axis of the block at `position` of a stack."""
    block = jax.tree.map(lambda part: _replicated_row(part, position), factors)
    return tuple(structure.to_dense(parts) for structure, parts in zip(stack.structures, block, strict=True))


def _replicated_row(part: jax.Array, position: int) -> jax.Array:
    sharding = jax.typeof(part).sharding
    if all(axis is None for axis in sharding.spec):
        return part[position]
    # A row of what carries a sharding in its type must be told where to go.
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return part.at[position].get(out_sharding=everywhere)

"""Reading the factors out of an optimizer's state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rootfree_optax._src.layout import Layout, Plan, Stack
from rootfree_optax._src.stacks.state import StackState
from rootfree_optax._src.transforms.kronecker import find_kronecker_states
from rootfree_optax._src.transforms.origin import is_of


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
    stacks = _find_stacks(state, plan) if plan.stacks else []
    return {
        block.name: _dense_factors(stacks[block.stack], plan.stacks[block.stack], block.position)
        for block in plan.blocks
    }


def _find_stacks(state: Any, plan: Plan) -> Sequence[StackState]:
    """Returns the stacks of the one transformation in a state that was made for a plan."""
    found = [node for node in find_kronecker_states(state) if is_of(node.origin, plan.summary)]
    if len(found) != 1 or not hasattr(found[0].stacks[0].block, "factors"):
        raise ValueError(
            "the state must hold the factors of one transformation of these parameters with this layout, got "
            f"{len(found)} such transformations. Pass the layout that it has, the parameters that it was given, and "
            "its own state, such as state.inner_states['label']."
        )
    return found[0].stacks


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

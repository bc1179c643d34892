"""Moving an optimizer's state between meshes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rootfree_optax._src.common.meshes import mesh_in_use
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.mesh.shard_map import partition
from rootfree_optax._src.mesh.state_shardings import state_shardings
from rootfree_optax._src.stacks.state import StackState


def move_state(state: Any, tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """Returns a state with its blocks in the order, and on the devices, that the mesh of the parameters asks for.

    Which device owns a block depends on the mesh, and on how parameters are sharded where blocks follow their shards
    (`Layout.specs`); so does the padding of stacks. A state from another mesh, such as a checkpoint restored into the
    arrays that it was saved from, is moved once:

        new[row of block k] = old[row of block k]

    Args:
      state: of the same transformations, for parameters of the same shapes that were sharded in any way, or in none.
        Blocks must have been cut alike: `Layout(block_size=…)` pins the cuts, which otherwise follow the shards.
      tx: the transformation, with the layout and mesh axes of today.
      params: arrays with `jax.sharding.NamedSharding`s on the mesh of today; or arrays without any.

    Returns:
      The state for `tx.update`, like `tx.init(params)`.

    Raises:
      ValueError: if the state has stacks of other blocks.

    Example:
      >>> import jax, jax.numpy as jnp, rootfree_optax as rf
      >>> params = jnp.zeros((4, 4))
      >>> sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec("data"))
      >>> sharded = jax.device_put(params, sharding)
      >>> state = rf.move_state(rf.sirf_shampoo(1e-3).init(params), rf.sirf_shampoo(1e-3, mesh_axes="data"), sharded)
      >>> state[0].stacks[0].momentum.sharding.mesh.axis_names
      ('data',)
    """
    mesh = mesh_in_use(params)
    shardings = None if mesh is None else state_shardings(tx, params)
    fresh = jax.jit(tx.init, out_shardings=shardings)(params)
    before, now = _blocks(state), _blocks(fresh)
    if before != now:
        raise ValueError(
            "the state must have the blocks into which tx cuts the parameters, but by stack their numbers and the "
            f"shapes of what is kept of each are {before}, and not {now}: it is of other parameters or options, or "
            "its blocks were cut for other shards. Layout(block_size=...) pins the cuts."
        )

    def move(state: Any, fresh: Any) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(jax.tree.map(_move, state, fresh, is_leaf=_is_stack)))

    if mesh is not None:
        move = functools.partial(partition, mesh, move, [sharding.spec for sharding in jax.tree.leaves(shardings)])
    out_shardings = None if mesh is None else tuple(jax.tree.leaves(shardings))
    return jax.tree.unflatten(jax.tree.structure(fresh), jax.jit(move, out_shardings=out_shardings)(state, fresh))


def _is_stack(node: Any) -> bool:
    return isinstance(node, StackState)


def _blocks(state: Any) -> list[tuple[int, list[Shape]]]:
    """Returns for each stack the number of blocks without padding, and the shapes of what is kept of each."""
    stacks = [node for node in jax.tree.leaves(state, is_leaf=_is_stack) if _is_stack(node)]
    shapes = lambda stack: [leaf.shape[1:] for leaf in jax.tree.leaves(stack._replace(number=None))]
    return [(int(jnp.sum(stack.size > 0)), shapes(stack)) for stack in stacks]


def _move(old: Any, new: Any) -> Any:
    """Returns the old state of a stack in the new one's order, with the new one's padding; of other leaves the old."""
    if not _is_stack(old):
        return old
    rows = jnp.arange(len(old.size), dtype=jnp.int32)
    before, now = [
        jnp.where(stack.size > 0, jnp.arange(len(stack.size)), -1) if stack.number is None else stack.number
        for stack in (old, new)
    ]
    row_of = jnp.zeros_like(rows).at[before].set(rows, mode="drop", wrap_negative_indices=False)[now]

    def take(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(now >= 0, range(1, new.ndim)), old[row_of], new)

    moved = jax.tree.map(take, old._replace(number=None), new._replace(number=None))
    return moved._replace(number=new.number)

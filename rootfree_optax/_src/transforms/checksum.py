"""A checksum of parameters and state, for what checkpoints do not notice themselves."""

from typing import Any

import jax
import jax.numpy as jnp

from rootfree_optax._src.stacks.state import StackState

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by the size of an entry; eight bytes are two


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """Returns a number that any damaged bit changes, the same on every mesh.

        Σₙ (2n + 1) · Σ words of the n-th array  (mod 2³²)

    Checkpoints of arrays tell a truncated file, but not a flipped bit in an array. So save this number with them, and
    hand it to `rf.check` after a restore. It takes one pass over the arrays. Blocks that pad a stack to a mesh do not
    count.

    Args:
      tree: arrays, such as (params, state).

    Returns:
      A scalar, uint32.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"w": jnp.ones((4, 4))}
      >>> tx = rf.sirf_muon(1e-3)
      >>> state = tx.init(params)
      >>> saved = rf.checksum((params, state))
      >>> rf.check(state, tx, params, saved)
      >>> bool(saved == rf.checksum(({"w": params["w"].at[0, 0].add(2**-20)}, state)))
      False
    """
    is_stack = lambda node: isinstance(node, StackState)
    total, number = jnp.zeros([], jnp.uint32), 0
    for node in jax.tree.leaves(tree, is_leaf=is_stack):
        for leaf in jax.tree.leaves(node):
            words = _words(jnp.asarray(leaf))
            if is_stack(node):
                is_block = (node.size > 0).reshape(-1, *(1,) * (words.ndim - 1))
                words = jnp.where(is_block, words, 0)
            total += jnp.uint32(2 * number + 1) * jnp.sum(words, dtype=jnp.uint32)
            number += 1
    return total


def _words(array: jax.Array) -> jax.Array:
    """Returns an array's bits as unsigned integers."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    return jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])

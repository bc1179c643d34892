"""A checksum of parameters and state, for what checkpoints do not notice themselves."""

from typing import Any

import jax
import jax.numpy as jnp

from rootfree_optax._src.stacks.state import StackState

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by the size of an entry; eight bytes are two


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """Returns a number that any damaged bit changes, the same on every mesh.

        Σₙ Σᵢ h(wₙᵢ ⊕ h(i + h(n)))  (mod 2³²)

    with the i-th word w of the n-th array, and a hash h that is one to one: a change of one word always tells, one of
    several misses once in 2³². Places count: one bit flipped in a compressed file may swap two words.

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
    total, salt = jnp.zeros([], jnp.uint32), jnp.zeros([], jnp.uint32)
    for node in jax.tree.leaves(tree, is_leaf=is_stack):
        is_block, numbers = None, None
        if is_stack(node):
            is_block, numbers = node.size > 0, node.number
            node = node._replace(number=None)  # it differs between meshes, as the order of the blocks does
            if numbers is not None:  # padding's is −1: this is zero, unless one is damaged
                total += jnp.sum(_hash(jnp.where(node.size > 0, 0, numbers + 1).astype(jnp.uint32)), dtype=jnp.uint32)
        for leaf in jax.tree.leaves(node):
            words = _words(jnp.asarray(leaf)).astype(jnp.uint32)
            hashes = _hash(words ^ _hash(_places(words.shape, numbers) + _hash(salt)))
            if is_block is not None:
                hashes = jnp.where(_expand(is_block, 0, words.ndim), hashes, 0)
            total, salt = total + jnp.sum(hashes, dtype=jnp.uint32), salt + 1
    return total


def _places(shape: tuple[int, ...], rows: jax.Array | None) -> jax.Array:
    """Returns the place of each word in its array; the rows are in order where none are given."""
    if not shape:
        return jnp.zeros([], jnp.uint32)
    rows = jnp.arange(shape[0]) if rows is None else rows
    places = _expand(rows.astype(jnp.uint32), 0, len(shape))
    for axis, length in enumerate(shape[1:], 1):
        places = places * jnp.uint32(length) + _expand(jnp.arange(length, dtype=jnp.uint32), axis, len(shape))
    return places


def _expand(values: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Returns values along one axis of an array, with length 1 along its others."""
    return jnp.expand_dims(values, [other for other in range(ndim) if other != axis])


def _hash(words: jax.Array) -> jax.Array:
    """Returns a number for each, one to one, that depends on every bit: MurmurHash3's last step."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


def _words(array: jax.Array) -> jax.Array:
    """Returns an array's bits as unsigned integers."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_ or (jnp.issubdtype(array.dtype, jnp.integer) and jnp.iinfo(array.dtype).bits < 8):
        return array.astype(jnp.uint8)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    return jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])

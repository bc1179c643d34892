"""Scalars of an optimizer's state, to log while it trains."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.numerics.arithmetic import max_abs
from rootfree_optax._src.stacks.state import StackState
from rootfree_optax._src.transforms.kronecker import find_kronecker_states
from rootfree_optax._src.transforms.origin import find_origins, require_origin


def info(state: Any) -> dict[str, jax.Array]:
    """Returns scalars that tell how the Kronecker transformations in a state are doing, to be logged at any step.

    They are sums, or extremes, over the blocks of all Kronecker transformations in the state. Some passes over the
    factors and no product: cheap beside a step. Works in `jax.jit`, and on sharded states. For a population of states,
    such as `jax.vmap(tx.init)` makes, use `jax.vmap(rf.info)`.

    Args:
      state: the state of a Kronecker transformation, or any tree that holds some, such as the state of a whole
        optimizer. Inside `jax.shard_map` over the state's mesh axes, the scalars are of the device's own blocks.

    Returns:
      A flat dict of scalars:

        refreshes    how many times a refresh of all blocks has been due; with `staggered`, how many rounds are over.
        refused      how many refreshes of a block were refused so far, since the factors would have come out
                     non-finite. Without a rule that counts them, the entry is missing.
        shortened    how many directions of a block were shortened so far: below the length of AdamW's step, in silence
                     or where the momentum is far larger than the gradients, or to a trust radius. A rule that never
                     shortens has no such entry.
        agreement    the averaged cosine between a block's gradient and the momentum before it, mean over all blocks.
                     Near one, a higher learning rate would be faster. On a decoder of 0.2 million parameters it was
                     near −0.1, at AdamW's best rate and at a quarter of it. A rule that does not average it has no
                     such entry.
        idle_blocks  how many blocks had a gradient of zeros or None in the last step, or have seen none yet.
        update_rms   the root mean square of the last directions, over all entries of all blocks. Learning rate, weight
                     decay and what else follows in a chain come later.
        scale_min    the smallest, and
        scale_max    the largest of the factors, by the largest absolute value that a factor K holds. Without a rule
                     that keeps factors, the two are missing.

    Raises:
      ValueError: if the state holds no Kronecker transformation, or was restored into a template that it does not fit,
        see `rf.check`.

    Example:
      >>> import jax, jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"seen": jnp.zeros((2, 3)), "unseen": jnp.zeros((2, 2))}
      >>> tx = rf.scale_by_sirf_shampoo(refresh_every=1)
      >>> gradients = {"seen": jnp.ones((2, 3)), "unseen": jnp.zeros((2, 2))}
      >>> updates, state = tx.update(gradients, tx.init(params))
      >>> scalars = rf.info(state)
      >>> print(*[f"{name} {scalars[name]}" for name in ("refreshes", "refused", "idle_blocks")], sep=", ")
      refreshes 1, refused 0, idle_blocks 1
    """
    for origin in find_origins(state):
        require_origin(origin, origin.text)  # restored into a template of other options or parameters
    nodes = find_kronecker_states(state)
    if not nodes:
        raise ValueError(
            "info needs the state of a Kronecker transformation, such as that of rf.sirf_shampoo, but there is none in "
            f"{jax.tree.structure(state)}."
        )
    stacks = [stack for node in nodes if isinstance(node.stacks, tuple) for stack in node.stacks]
    squares = _sum([jnp.where(stack.size > 0, stack.squared_norm, 0) for stack in stacks], jnp.float32)
    entries = _sum([stack.size for stack in stacks], jnp.float32)
    scalars = {
        "refreshes": functools.reduce(jnp.maximum, [node.refreshes for node in nodes]),
        "idle_blocks": _sum([(stack.largest_gradient == 0) & (stack.size > 0) for stack in stacks], jnp.int32),
        "update_rms": jnp.sqrt(squares / jnp.maximum(entries, 1)),
    }
    for name in ("refused", "shortened"):
        counts = [(stack, getattr(stack.block, name, None)) for stack in stacks]
        if kept := [jnp.where(stack.size > 0, count, 0) for stack, count in counts if count is not None]:
            scalars[name] = _sum(kept, jnp.int32)
    if averaging := [stack for stack in stacks if hasattr(stack.block, "agreement")]:
        total = _sum([jnp.where(stack.size > 0, stack.block.agreement, 0) for stack in averaging], jnp.float32)
        scalars["agreement"] = total / jnp.maximum(_sum([stack.size > 0 for stack in averaging], jnp.float32), 1)
    if scales := [(stack, scale) for stack in stacks for scale in _scales(stack)]:
        least = [jnp.min(jnp.where(stack.size > 0, scale, jnp.inf)) for stack, scale in scales]
        most = [jnp.max(jnp.where(stack.size > 0, scale, -jnp.inf)) for stack, scale in scales]
        scalars["scale_min"] = functools.reduce(jnp.minimum, least)
        scalars["scale_max"] = functools.reduce(jnp.maximum, most)
    return scalars


def _sum(arrays: Iterable[jax.Array], dtype: DTypeLike) -> jax.Array:
    return sum([jnp.sum(array, dtype=dtype) for array in arrays], jnp.zeros([], dtype))


def _scales(stack: StackState) -> list[jax.Array]:
    """Returns for each axis the largest absolute value in each block's factor, [blocks]."""
    largest: Callable[..., jax.Array] = jax.vmap(max_abs)
    return [largest(tuple(jax.tree.leaves(parts))).astype(jnp.float32) for parts in getattr(stack.block, "factors", ())]

"""What both Kronecker transformations do with a plan's stacks: set up, pack, refresh, precondition, unpack.

A stack's arrays have a leading axis of blocks; the mathematics of one block is `jax.vmap`ped over it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax.factor_step import times_scalar
from rootfree_optax.factor_update import all_finite
from rootfree_optax.layout import Plan
from rootfree_optax.layout.rules import DTypeRule, dtypes_of

Stacks = Any  # a tuple over the stacks of a plan


def initial_factors(
    plan: Plan, params: optax.Params, dtype_rule: DTypeRule = None, *, curvature: ArrayLike = 1.0
) -> Stacks:
    """Returns each stack's factors, all of a block's multiples of I: s^(−1/2N)·I for a curvature of s and N axes.

    A plan without any block has one empty array in place of its factors: `optax.tree.map_params` initialises on such
    a tree, and takes what it finds there for a leaf that stands for all of a real state's factors.

    Args:
      plan: the plan of `params`.
      params: the parameters, or their shapes and dtypes; a stack's default dtype is the widest of its parameters'.
      dtype_rule: the factors' dtypes, see `scale_by_sirf_shampoo`.
      curvature: s > 0, a scalar.
    """

    def identity(stack: Any, default: DTypeLike) -> Any:
        dtypes = dtypes_of(dtype_rule, len(stack.shape), default)
        scale = curvature ** (-0.5 / len(dtypes))
        factors = tuple(
            times_scalar(s.identity(dtype), scale) for s, dtype in zip(stack.structures, dtypes, strict=True)
        )
        return jax.tree.map(lambda part: jnp.broadcast_to(part, (stack.count, *part.shape)), factors)

    defaults = [packed.dtype for packed in jax.eval_shape(plan.pack, params)]
    return tuple(map(identity, plan.stacks, defaults)) or jnp.zeros([0])


def not_started(plan: Plan) -> Stacks:
    """Returns for each block of each stack that it has not started; see `initial_factors` for a plan without any."""
    return tuple(jnp.zeros(stack.count, bool) for stack in plan.stacks) or jnp.zeros([0], bool)


def all_of(flags: Stacks) -> jax.Array:
    """Returns whether all booleans of all stacks are true, a scalar."""
    return functools.reduce(jnp.logical_and, map(jnp.all, flags), jnp.asarray(True))


def _require_state_of(plan: Plan, factors: Stacks) -> None:
    if not plan.stacks:
        return
    expected = [shape for stack in plan.stacks for shape in stack.part_shapes]
    found = [jnp.shape(part) for part in jax.tree.leaves(factors)]
    if found != expected:
        raise ValueError(
            "the state must come from init on parameters of the shapes that update is given, with the same layout. "
            f"The factors' arrays have the shapes {found}, but the layout asks for {expected}."
        )


def pack(plan: Plan, updates: optax.Updates, factors: Stacks) -> Stacks:
    """Returns the stacks of the gradients; `factors` must be of this plan."""
    _require_state_of(plan, factors)
    return plan.pack(_replicated(updates), name="gradients")


def pack_curvature(plan: Plan, curvature: optax.Updates, updates: optax.Updates) -> Stacks:
    """Returns the stacks of a tree like `updates`, [blocks, …], or one with a leading axis, [blocks, samples, …]."""
    pack = functools.partial(plan.pack, name="curvature")
    ranks = [jnp.ndim(leaf) for leaf in jax.tree.leaves(curvature)]
    if ranks == [jnp.ndim(leaf) + 1 for leaf in jax.tree.leaves(updates)]:
        pack = jax.vmap(pack, out_axes=1)
    return pack(_replicated(curvature))


def refresh_when(
    due: jax.Array | bool,
    plan: Plan,
    refresh: Callable[..., tuple[Any, ...]],
    curvatures: Stacks,
    state: tuple[Stacks, ...],
) -> tuple[Stacks, ...]:
    """Returns the state that `refresh` makes of each stack's, or the old state where it is not due.

    Args:
      due: whether to refresh, a scalar.
      plan: the plan of the stacks.
      refresh: for one block, (curvature, *state, structures=…) -> new state.
      curvatures: the stacks that the curvature is estimated from.
      state: tuples over the stacks.
    """

    def refreshed() -> tuple[Stacks, ...]:
        each = [
            jax.vmap(functools.partial(refresh, structures=stack.structures))(curvature, *block_state)
            for stack, curvature, *block_state in zip(plan.stacks, curvatures, *state, strict=True)
        ]
        return tuple(zip(*each, strict=True))

    if not plan.stacks:
        return state
    return refreshed() if due is True else jax.lax.cond(due, refreshed, lambda: state)


def precondition(
    plan: Plan, precondition_block: Callable[..., jax.Array], gradients: Stacks, factors: Stacks
) -> Stacks:
    """Returns the stacks of directions; a block of the gradient that is not finite is its own direction.

    Args:
      plan: the plan of the stacks.
      precondition_block: for one block, (gradient, factors, structures=…) -> direction.
      gradients: the stacks of gradients.
      factors: for each stack, its factors.
    """
    directions = tuple(
        jax.vmap(functools.partial(precondition_block, structures=stack.structures))(gradient, block_factors)
        for stack, gradient, block_factors in zip(plan.stacks, gradients, factors, strict=True)
    )
    finite = tuple(map(jax.vmap(all_finite), gradients))

    def show_non_finite() -> Stacks:
        return tuple(
            jax.vmap(jnp.where)(keep, direction, gradient.astype(direction.dtype))
            for keep, direction, gradient in zip(finite, directions, gradients, strict=True)
        )

    # Not a plain `where`: the compiler would fuse it into each parameter's update, a program of its own each time.
    return jax.lax.cond(all_of(finite), lambda: directions, show_non_finite)


def unpack(plan: Plan, directions: Stacks, updates: optax.Updates) -> optax.Updates:
    """Returns the tree of directions, with the dtypes and shardings of `updates`."""
    return _sharded_like(plan.unpack(directions, updates), updates)


def _replicated(tree: Any) -> Any:
    """Replicates arrays that carry a sharding in their type: blocks are cut across its boundaries."""

    def replicate(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        return leaf if all(axis is None for axis in spec) else jax.sharding.reshard(leaf, jax.sharding.PartitionSpec())

    return jax.tree.map(replicate, tree)


def _sharded_like(tree: Any, reference: Any) -> Any:
    def shard(leaf: jax.Array, like: jax.Array) -> jax.Array:
        spec = jax.typeof(like).sharding.spec
        return leaf if all(axis is None for axis in spec) else jax.sharding.reshard(leaf, spec)

    return jax.tree.map(shard, tree, reference)

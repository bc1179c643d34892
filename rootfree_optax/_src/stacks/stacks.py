"""What both Kronecker transformations do with a plan's stacks: set up, pack, precondition, unpack."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.factor_step import times_scalar
from rootfree_optax._src.common import trees
from rootfree_optax._src.layout.rules import DTypeRule, dtypes_of
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.mesh.partition import axes_of_type
from rootfree_optax._src.mesh.stacks_on_mesh import ShardedPlan
from rootfree_optax._src.stacks.each_stack import Given, Stacks, as_tree, of_stack


def initial_factors(
    plan: ShardedPlan, params: optax.Params, dtype_rule: DTypeRule = None, *, curvature: ArrayLike = 1.0
) -> Stacks:
    """Returns each stack's factors, all s^(−1/2N)·I for a curvature of s and blocks of N axes.

    A plan without any block has one empty array in place of its factors: `optax.tree.map_params` initialises on such
    a tree, and takes what it finds there for a leaf that stands for all of a real state's factors.

    Args:
      plan: the plan of `params`.
      params: the parameters, or their shapes and dtypes; a stack's default dtype is the widest of its parameters'.
      dtype_rule: the factors' dtypes, see `scale_by_sirf_shampoo`.
      curvature: s > 0, a scalar.
    """
    defaults = widest_dtypes(plan, params)
    dtypes = [dtypes_of(dtype_rule, len(s.shape), dtype) for s, dtype in zip(plan.stacks, defaults, strict=True)]
    lengths = [length // plan.shards for length in plan.lengths]
    if not plan.stacks:
        return jnp.zeros([0])
    return plan.on_shards(_initial_factors, (plan.stacks, dtypes, lengths, curvature, plan.anchor(params)))


def widest_dtypes(plan: ShardedPlan, params: optax.Params) -> list[DTypeLike]:
    """Returns for each stack the widest dtype of its parameters."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
    return [packed.dtype for packed in jax.eval_shape(plan.plan.pack, shapes)]


def _initial_factors(shared: Any) -> Stacks:
    stacks, dtypes, lengths, curvature, anchor = shared

    def initial(stack: Stack, dtypes: Sequence[DTypeLike], length: int) -> Any:
        scale = curvature ** (-0.5 / len(stack.shape))
        factors = tuple(
            times_scalar(s.identity(dtype), scale) for s, dtype in zip(stack.structures, dtypes, strict=True)
        )
        zero = jnp.sum(anchor)
        return jax.tree.map(
            lambda part: jnp.broadcast_to(part, (length, *part.shape)) + zero.astype(part.dtype), factors
        )

    return tuple(map(initial, stacks, dtypes, lengths))


def zeros_like(plan: ShardedPlan, factors: Stacks) -> Stacks:
    """Returns zeros of the factors' shapes, dtypes and shardings."""
    return plan.on_shards(_zeros_like, None, factors)


def _zeros_like(_: None, factors: Stacks) -> Stacks:
    return jax.tree.map(jnp.zeros_like, factors)


def not_started(plan: ShardedPlan, factors: Stacks) -> Stacks:
    """Returns for each block of each stack that it has not started; see `initial_factors` for a plan without any."""
    return plan.on_shards(_not_started, None, factors) if plan.stacks else jnp.zeros([0], bool)


def _not_started(_: None, factors: Stacks) -> Stacks:
    return tuple(jnp.zeros(len(block_factors[0][0]), bool) for block_factors in factors)


def nothing_observed(plan: ShardedPlan, factors: Stacks) -> Stacks:
    """Returns for each stack zeros like its factors, and a zero for each block; see `initial_factors` for no stack."""
    return plan.on_shards(_nothing_observed, None, factors) if plan.stacks else jnp.zeros([0])


def _nothing_observed(_: None, factors: Stacks) -> Stacks:
    zeros_of = lambda block_factors: jax.tree.map(jnp.zeros_like, block_factors)
    return tuple((zeros_of(of_stack), jnp.zeros(len(of_stack[0][0]), jnp.int32)) for of_stack in factors)


def typed_as_updated(plan: ShardedPlan, params: optax.Params, state: Any) -> Any:
    """Returns a new state's arrays with the types that updates will give them inside `jax.shard_map`.

    These say over which axes of the mesh an array varies: those that a parameter varies over, and those that the plan
    is split over. Branches and loops want arrays of one type.
    """
    traced = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.core.Tracer)]
    if not traced or not axes_of_type(jax.sharding.get_abstract_mesh(), AxisType.Manual):
        return state
    # Never true, but of the parameters' type: how that is spelled differs between versions of JAX.
    sums = [jnp.sum(leaf) for leaf in traced]
    never = functools.reduce(jnp.logical_or, [(total != total) & (total == total) for total in sums])
    if plan.is_local:
        never |= jax.lax.axis_index(plan.axes) < 0
    return jax.tree.map(lambda array: jnp.where(never, jnp.zeros_like(array), array), state)


def pack(plan: ShardedPlan, updates: optax.Updates) -> Stacks:
    """Returns the stacks of the gradients."""
    return plan.pack(updates, "gradients")


def curvatures(plan: ShardedPlan, curvature: optax.Updates | None, updates: optax.Updates, gradients: Stacks) -> Given:
    """Returns the stacks that the curvature is estimated from, or a function that packs them where it is.

    That is within the branch of a refresh, so that other steps need no copy of the gradients as they are. From other
    devices they are fetched once and for all.

    Args:
      plan: the plan of the stacks.
      curvature: what `update` was given: a tree like `updates`, or one with a leading axis of samples; or None.
      updates: the tree of gradients.
      gradients: the stacks of those.
    """
    if plan.axes:
        return gradients if curvature is None else pack_curvature(plan, curvature, updates)
    return lambda: pack(plan, updates) if curvature is None else pack_curvature(plan, curvature, updates)


def pack_curvature(plan: ShardedPlan, curvature: optax.Updates, updates: optax.Updates) -> Stacks:
    """Returns the stacks of a tree like `updates`, [blocks, …], or one with a leading axis, [blocks, samples, …]."""
    given, expected = trees.named_leaves(curvature), trees.named_leaves(updates)
    both = [path for path in given if given[path] is not None and expected.get(path) is not None]
    has_samples = bool(both) and all(jnp.ndim(given[path]) == jnp.ndim(expected[path]) + 1 for path in both)
    return plan.pack(curvature, "curvature", sample_axis=has_samples)


def precondition(
    plan: ShardedPlan, precondition_block: Callable[..., jax.Array], gradients: Stacks, factors: Stacks
) -> Stacks:
    """Returns the stacks of directions.

    Args:
      plan: the plan of the stacks.
      precondition_block: for one block, (gradient, factors, structures=…) -> direction.
      gradients: the stacks of gradients.
      factors: for each stack, its factors.
    """
    return plan.on_shards(_directions, (plan.stacks, as_tree(precondition_block)), gradients, factors)


def _directions(shared: Any, gradients: Stacks, factors: Stacks) -> Stacks:
    stacks, precondition_block = shared
    blocks = zip(stacks, gradients, factors, strict=True)
    return tuple(of_stack(precondition_block, stack)(*block) for stack, *block in blocks)


def unpack(plan: ShardedPlan, directions: Stacks, updates: optax.Updates) -> optax.Updates:
    """Returns the tree of directions, with the dtypes and shardings of `updates`."""
    return plan.unpack(directions, updates)

"""The one Kronecker transformation: packs parameters into stacks of blocks, each preconditioned as a rule says."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from rootfree_optax._src.blocks.rule import BlockRule, Step
from rootfree_optax._src.common import schedules, trees, validate
from rootfree_optax._src.common.compat import match_varying_axes
from rootfree_optax._src.common.compiled import call_compiled
from rootfree_optax._src.common.schedules import Interval, RefreshEvery, Staggered
from rootfree_optax._src.layout import Layout, Plan
from rootfree_optax._src.mesh.stacks_on_mesh import LocalStacks, MeshAxes, WholeStacks, place_stacks, require_mesh_axes
from rootfree_optax._src.mesh.state_shardings import on_devices_of
from rootfree_optax._src.stacks.state import StackState, StackStep, init_stacks
from rootfree_optax._src.stacks.step import LazyStacks, measure_largest_scale, step_stacks
from rootfree_optax._src.transforms.origin import (
    describe_origin,
    dtype_name,
    make_origin,
    nan_unless,
    require_origin,
)
from rootfree_optax._src.transforms.reports import KroneckerReport, report


class ScaleByKroneckerState(NamedTuple):
    """State of a Kronecker transformation.

    Attributes:
      count: how many updates there have been.
      stacks: what is kept for each stack of the plan. Without any block, a zero: `optax.tree.map_params` runs `init` on
        an empty tree and matches its leaves with a real state's, and Orbax saves no empty arrays.
      rest: what is kept for the parameters without factors, by their names in `Plan.rest`; likewise without any.
      refreshes: how many times a refresh of all blocks has been due; with `staggered`, how many rounds are over.
      origin: what the state belongs to, see `rf.check`.
    """

    count: jax.Array  # type: ignore[assignment]  # Optax names it so, and tuples have a method of that name
    stacks: Any
    rest: Any
    refreshes: jax.Array
    origin: Any


def find_kronecker_states(tree: Any) -> list[ScaleByKroneckerState]:
    """Returns the states of all Kronecker transformations anywhere in a tree."""
    is_state = lambda node: isinstance(node, ScaleByKroneckerState)
    found = [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]
    return [state for node in found for state in (node, *find_kronecker_states(node.rest))]


def scale_by_kronecker(
    rule: BlockRule,
    *,
    weight: optax.ScalarOrSchedule = 0.1,
    damping: optax.ScalarOrSchedule = 0.0,
    absolute_damping: optax.ScalarOrSchedule = 0.0,
    batch_size: ArrayLike | None = 1,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
    refresh_every: RefreshEvery = 1,
    statistics_every: Interval | None = None,
    layout: Layout = Layout(diagonal=None),  # noqa: B008  # a frozen value
    mesh_axes: MeshAxes = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients block by block, as a rule says.

        M ← momentum·M + (1 − momentum)·G,    direction = rule.precondition(M̂, …)

    with M̂ corrected for its start at zero.

    Blocks of one shape form one stack, and a rule is mapped over whole stacks: the program does not grow with the
    model's depth. A non-finite gradient leaves its entries of M as they were.

    Args:
      rule: what is done with a block, see `BlockRule`.
      weight: β₂, what rules find as `step.weight`. A number, a traced scalar or a schedule.
      damping: at least 0, what rules find as `step.damping`. A number, a traced scalar or a schedule.
      absolute_damping: λ ≥ 0, what rules find as `step.absolute_damping`. A number, a traced scalar or a schedule.
      batch_size: B > 0, how many terms the loss averages. A `batch_size=` passed to `update` wins; it must have one if
        this is None.
      momentum: in [0, 1): the gradients' average takes the gradient's place in the direction, not in the curvature. A
        number or a traced scalar; None averages nothing and keeps no M.
      nesterov: whether it is Nesterov's, (1 − momentum)·G + momentum·M.
      mu_dtype: floating-point dtype of M; by default the widest dtype of the parameters in a stack.
      refresh_every: T ≥ 1, preconditioners are refreshed at every T-th update, the first one included; or
        `staggered(T)`, or a callable from the number of past updates to whether this one refreshes, as `growing(T)`.
      statistics_every: c ≥ 1, statistics take in every c-th gradient; or a callable, as above. None: they take in none.
      layout: how parameters become blocks, and the structure and dtype of their factors.
      mesh_axes: name of a mesh axis, or a tuple of names, over which the blocks of every stack are divided, state and
        work; None divides nothing. The mesh is that of `jax.set_mesh`, or else the one that the arrays are on; inside
        `jax.shard_map` over these axes the state is a device's own part. See `state_shardings`.
      rest: what updates the parameters without factors, see `Layout.diagonal`, as a dictionary by key path. Required
        where the layout leaves any out.

    Returns:
      A transformation whose `update` takes two extra arguments: `batch_size`, and `curvature`, a tree like the
      gradients (or with one more leading axis of samples) that takes G's place in the curvature.

    Raises:
      ValueError: at construction for a Python number out of range; at `init` for a layout that does not fit a
        parameter, or a structure that the rule does not support; at the first `update` without any batch size, or for
        gradients or a state unlike the parameters; at both without a mesh that has the `mesh_axes`.
      TypeError: at construction for a schedule where none may be, or a rule that is no `BlockRule`; at `init` for
        parameters that are not real floating point.

    Example: see `BlockRule`.
    """
    at_construction = batch_size
    if not isinstance(rule, BlockRule):
        raise TypeError(f"rule must be a BlockRule, got {rule!r}.")
    validate.require_number("weight", weight, validate.NON_NEGATIVE)
    validate.require_number("damping", damping, validate.NON_NEGATIVE)
    validate.require_number("absolute_damping", absolute_damping, validate.NON_NEGATIVE)
    schedules.require_batch_size(batch_size)
    validate.require_number("momentum", momentum, validate.FRACTION, schedule=False, optional=True)
    validate.require_floating_dtype("mu_dtype", mu_dtype)
    if not isinstance(refresh_every, Staggered):
        validate.require_interval("refresh_every", refresh_every)
    validate.require_interval("statistics_every", statistics_every, optional=True)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be an rf.Layout, got {layout!r}.")
    require_mesh_axes(mesh_axes)
    for_rest = optax.with_extra_args_support(optax.identity() if rest is None else rest)
    if momentum is None and nesterov:
        raise ValueError("momentum must be given for nesterov=True, got None. Pass a number, such as 0.9.")
    options = {
        "rule": type(rule).__qualname__,
        **rule.options(),
        "momentum": validate.kind_of(momentum),
        "mu_dtype": dtype_name(mu_dtype),
        "statistics_every": validate.kind_of(statistics_every),
    }

    def init(params: optax.Params) -> ScaleByKroneckerState:
        plan = layout.plan(params)
        count, refreshes = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)  # two buffers, so both can be donated
        rest_state: Any = jnp.zeros([])
        if plan.rest:
            rest_state = for_rest.init(_select_rest(plan, trees.named_leaves(params), rest))
        states: Any = jnp.zeros([])
        axes: tuple[str, ...] = ()
        sent = None
        if plan.stacks:
            _require_supported(rule, plan)
            placed = place_stacks(plan, mesh_axes, (params, layout.shardings))
            axes = placed.axes
            widest = _widest_dtypes(plan, params)
            if placed.holders is not None:
                sent = placed.holders.bytes_received([dtype.itemsize for dtype in widest])
            factor_dtypes = [
                [default if dtype is None else dtype for dtype in stack.factor_dtypes]
                for stack, default in zip(plan.stacks, widest, strict=True)
            ]
            momentum_dtypes = None if momentum is None else [mu_dtype or dtype for dtype in widest]
            anchor = placed.anchor(params)
            given = (placed, rule, factor_dtypes, momentum_dtypes, anchor)
            with on_devices_of(params):
                states = (
                    placed.on_shards(init_stacks, len(given))(*given) if axes else call_compiled(init_stacks, given)
                )
            states = match_varying_axes(states, params, axes)
        origin = make_origin(describe_origin(options, plan.summary), params)
        state = ScaleByKroneckerState(count, states, rest_state, refreshes, origin)
        report(KroneckerReport(plan, rule, refresh_every, statistics_every, axes, sent, state))
        return state

    def update(
        updates: optax.Updates,
        state: ScaleByKroneckerState,
        params: optax.Params | None = None,
        *,
        batch_size: ArrayLike | None = None,
        curvature: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByKroneckerState]:
        count = optax.safe_increment(state.count)
        plan = layout.plan(updates) if params is None else layout.plan(params, updates)
        is_own = _require_own(state, describe_origin(options, plan.summary), updates, params)
        rest_updates, rest_state = {}, state.rest
        if plan.rest:
            others = None if params is None else _select_rest(plan, trees.named_leaves(params), rest)
            own = _select_rest(plan, plan.named_leaves(updates, "gradients"), rest)
            if batch_size is not None:
                extra_args["batch_size"] = batch_size
            if curvature is not None:
                given = plan.named_leaves(curvature, "curvature", sample_axis=True)
                extra_args["curvature"] = _select_rest(plan, given, rest)
            by_name, rest_state = for_rest.update(own, rest_state, others, **extra_args)
            rest_updates = {parameter.path: by_name[parameter.name] for parameter in plan.rest}
        if not plan.stacks:
            updates = plan.unpack((), updates, rest=rest_updates)
            return updates, state._replace(count=count, rest=rest_state)
        placed = _place_state(plan, mesh_axes, state.stacks, (updates, layout.shardings))
        step = StackStep(
            plan.stacks,
            rule,
            Step(
                state.count,
                schedules.value_at("weight", weight, state.count),
                schedules.value_at("damping", damping, state.count),
                schedules.value_at("absolute_damping", absolute_damping, state.count),
                schedules.resolve_batch_size(batch_size, at_construction),
                is_own_curvature=curvature is None,
            ),
            observe=None if statistics_every is None else schedules.is_due(statistics_every, state.count),
            refresh=schedules.is_due(refresh_every, state.count),
            momentum=momentum,
            nesterov=nesterov,
            has_missing=trees.has_none(updates),
        )
        arrays = (updates, curvature, rest_updates, state.stacks, is_own)
        if trees.has_tracer((step, arrays)):
            new_updates, states = _step_tree(placed, step, *arrays)
        else:  # each small operation would be compiled by itself
            step = step._replace(scalars=Step(*map(jnp.asarray, step.scalars)))
            new_updates, states = call_compiled(_step_tree, (placed, step), *arrays)
        is_done = count % step.refresh.period == 0 if isinstance(step.refresh, Staggered) else step.refresh
        refreshes = state.refreshes + jnp.asarray(is_done, state.refreshes.dtype)
        return new_updates, ScaleByKroneckerState(count, states, rest_state, refreshes, state.origin)

    return optax.GradientTransformationExtraArgs(init, update)


def _step_tree(
    placed: WholeStacks,
    step: StackStep,
    updates: optax.Updates,
    curvature: optax.Updates | None,
    rest_updates: Mapping[str, jax.Array],
    states: tuple[StackState, ...],
    is_own: jax.Array | None,
) -> tuple[optax.Updates, tuple[StackState, ...]]:
    """Returns the directions of all parameters, and the new states of the stacks."""
    gradients = placed.pack(updates, "gradients")
    samples = _pack_samples(placed, curvature, updates, gradients, is_lazy=step.observe is not True)
    largest = measure_largest_scale(step.rule, states, placed.local_axes)
    step = step._replace(scalars=step.scalars._replace(largest_scale=largest))
    directions, states = placed.on_shards(step_stacks)(step, gradients, samples, states)
    if placed.holders is not None:
        numbers = tuple([state.number for state in states])
        directions = placed.on_shards(_refuse_misplaced)(placed, directions, numbers)
    directions = tuple([nan_unless(is_own, direction) for direction in directions])
    return placed.unpack(directions, updates, rest_updates), states


def _require_own(
    state: ScaleByKroneckerState, text: str, updates: optax.Updates, params: optax.Params | None
) -> jax.Array | None:
    """Returns what `require_origin` does."""
    try:
        return require_origin(state.origin, text)
    except ValueError:
        if params is None and trees.has_none(updates):  # it is not known which are parameters without a gradient
            raise ValueError(
                "params must be given where a gradient is None: call tx.update(grads, state, params)."
            ) from None
        raise


def _select_rest(plan: Plan, leaves: Mapping[str, Any], rest: optax.GradientTransformation | None) -> dict[str, Any]:
    """Returns the leaves of the parameters without factors, of which there are some, by name.

    Raises:
      ValueError: if there is nothing that updates them.
    """
    if rest is None:
        raise ValueError(
            f"the layout gives no factors to {plan.rest[0].path!r}, so rest must update such parameters. "
            "Pass rest=optax.scale_by_adam(), or Layout(diagonal=None) for factors everywhere."
        )
    return {parameter.name: leaves[parameter.path] for parameter in plan.rest}


def _require_supported(rule: BlockRule, plan: Plan) -> None:
    for block in plan.blocks:
        for structure in plan.stacks[block.stack].structures:
            if (reason := rule.supports(structure)) is not None:
                raise ValueError(f"got the structure {structure.name!r} at {block.name!r}, but {reason}")


def _widest_dtypes(plan: Plan, params: optax.Params) -> list[jnp.dtype]:
    """Returns for each stack the widest dtype of its parameters."""
    # By key path, as a class of the user's may refuse to hold anything but arrays.
    leaves = {path: leaf for path, leaf in trees.named_leaves(params).items() if leaf is not None}
    shapes = {path: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for path, leaf in leaves.items()}
    return [packed.dtype for packed in jax.eval_shape(plan.pack, shapes)]


def _place_state(plan: Plan, mesh_axes: MeshAxes, states: Sequence[StackState], updates: Any) -> WholeStacks:
    """Returns where a state's stacks are.

    Raises:
      ValueError: if the state is of another mesh.
    """
    placed = place_stacks(plan, mesh_axes, (states, updates))
    expected = placed.own_lengths if isinstance(placed, LocalStacks) else placed.lengths
    lengths = tuple([len(state.size) for state in states])
    in_order = {state.number is None for state in states}
    if lengths != expected or in_order != {placed.holders is None}:
        raise ValueError(
            f"the state's stacks must have {expected} blocks, in the order that mesh_axes={mesh_axes!r} and the "
            f"parameters' shardings ask for, got {lengths}: it is of another mesh. Move it with "
            "rf.move_state(state, tx, params)."
        )
    return placed


def _refuse_misplaced(
    placed: WholeStacks, directions: tuple[jax.Array, ...], numbers: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Returns directions, NaN where a state's blocks are in another mesh's order: its shapes alone do not tell."""
    fits = [jnp.all(number == placed.numbers(index)) for index, number in enumerate(numbers)]
    return tuple([jnp.where(fit, direction, jnp.nan) for fit, direction in zip(fits, directions, strict=True)])


def _pack_samples(
    placed: WholeStacks,
    curvature: optax.Updates | None,
    updates: optax.Updates,
    gradients: tuple[jax.Array, ...],
    *,
    is_lazy: bool,
) -> LazyStacks:
    """Returns the stacks that the curvature is estimated from.

    If they are not needed at every step, they are lazy where every device has all of them: packed within the branch of
    a refresh, so that other steps need no copy of the gradients. From other devices they are fetched once, before any
    branch.

    Args:
      placed: where the stacks are.
      curvature: a tree like `updates`, or one with a leading axis of samples; None: the gradients themselves.
      updates: the tree of gradients.
      gradients: the stacks of gradients.
      is_lazy: whether some steps do without.
    """
    is_lazy &= not placed.axes
    if curvature is None:
        return functools.partial(placed.pack, updates, "gradients") if is_lazy else gradients
    given, expected = trees.named_leaves(curvature), trees.named_leaves(updates)
    both = [path for path in given if given[path] is not None and expected.get(path) is not None]
    has_samples = bool(both) and all(jnp.ndim(given[path]) == jnp.ndim(expected[path]) + 1 for path in both)
    pack = functools.partial(placed.pack, curvature, "curvature", sample_axis=has_samples)
    return pack if is_lazy else pack()

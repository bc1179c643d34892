"""What an optimizer keeps and computes for given parameters, found by tracing its `init`."""

import collections
import dataclasses
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from rootfree_optax._src.blocks.rule import BlockFlops
from rootfree_optax._src.common import trees
from rootfree_optax._src.common.schedules import RefreshEvery, Staggered
from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout.paths import plain_paths
from rootfree_optax._src.mesh.state_shardings import state_shardings, use_mesh_of
from rootfree_optax._src.stacks.state import StackState
from rootfree_optax._src.transforms.description import Compiled, Description, Row
from rootfree_optax._src.transforms.kronecker import find_kronecker_states
from rootfree_optax._src.transforms.reports import KroneckerReport, collect_reports


def describe(
    tx: optax.GradientTransformation, params: optax.Params, *, compile: bool = False, **extra_args: Any
) -> Description:
    """Describes an optimizer: what it keeps for each parameter, and what its steps cost.

    For every chain of Optax's transformations and these, also under wrappers such as `optax.partition`. The numbers are
    those of the state that `tx.init` makes; nothing is allocated. Parameters that differ only by numbers in their key
    paths share a row.

    Args:
      tx: the optimizer.
      params: the parameters: arrays or `jax.ShapeDtypeStruct`s.
      compile: whether to compile one update and tell its memory, too. That takes as long as it does in training.
      **extra_args: of `tx.update`, for `compile`, such as `value=0.0`; by default a batch size, if it takes any.

    Returns:
      A description to print; its numbers are attributes, see `Description`.

    Raises:
      ValueError: if `tx` has a Kronecker transformation whose `init` was compiled before.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {f"layer_{i}": {"kernel": jnp.zeros((64, 48)), "bias": jnp.zeros(48)} for i in range(12)}
      >>> description = rf.describe(rf.published.sirf_shampoo(1e-3, batch_size=8, refresh_every=10), params)
      >>> print(description)
      parameter       shape        blocks       structure  dtype  state
      ─────────────────────────────────────────────────────────────────
      layer_*/bias    12 of 48     12 of 48     diagonal   f32    7.1kB
      layer_*/kernel  12 of 64×48  12 of 64×48  dense      f32    762kB
      ─────────────────────────────────────────────────────────────────
      total           37.4k        24                             777kB
      State: 2.60 times Adam's 300kB of two numbers for each entry of the parameters.
      Step: 16.5M FLOPs of products, without refresh and statistics.
      Refresh: 34.4M FLOPs, every 10 steps.
      >>> description.state_bytes, description.flops.refresh
      (777368, 34411008)
    """
    tree = params.fast if isinstance(params, optax.LookaheadParams) else params
    facts: list[tuple[int, Mapping[str, int], Any]] = []

    def init(params: optax.Params) -> list[jax.Array]:
        """Returns the state's arrays alone, as a class of the user's may refuse to hold shapes."""
        state = tx.init(params)
        facts.append((len(find_kronecker_states(state)), _bytes_outside_stacks(state, tree), jax.tree.structure(state)))
        return jax.tree.leaves(state)

    with collect_reports() as reports, use_mesh_of(params):
        arrays = jax.eval_shape(init, params)
    [(found, outside, structure)] = facts
    if found != len(reports):
        raise ValueError(
            f"tx must call init of its Kronecker transformations when it is traced, but of {found} only {len(reports)} "
            "did. Describe it before its init is wrapped in jax.jit."
        )
    leaves = {path: leaf for path, leaf in trees.named_leaves(tree).items() if leaf is not None}
    stacks = [(report.rule, stack) for report in reports for stack in report.plan.stacks]
    with_blocks = [report for report in reports if report.plan.stacks]
    return Description(
        rows=tuple(_rows(_items(reports, leaves, outside))),
        parameters=sum(math.prod(jnp.shape(leaf)) for leaf in leaves.values()),
        blocks=sum(stack.count for _, stack in stacks),
        state_bytes=_bytes(arrays),
        adam_bytes=2 * _bytes(leaves),
        flops=_total([(rule.flops(stack.structures), stack.count) for rule, stack in stacks]),
        refresh_every=_in_words([report.refresh_every for report in with_blocks]),
        statistics_every=_in_words([report.statistics_every for report in with_blocks]),
        mesh_axes=tuple(dict.fromkeys(axis for report in reports for axis in report.axes)),
        received_bytes=None
        if any(report.axes and report.received_bytes is None for report in reports)
        else sum(report.received_bytes or 0 for report in reports),
        compiled=_compile(tx, tree, (arrays, structure), params, extra_args) if compile else None,
    )


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of one shape of a parameter; of a parameter without blocks, `structure` says why."""

    count: int
    shape: Shape
    structure: str
    dtype: str
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class _Item:
    """A parameter, or a group that has one name, with its blocks by shape, and the bytes of what is kept beside."""

    name: str
    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    blocks: tuple[_Blocks, ...]
    other_bytes: int


def _items(
    reports: Sequence[KroneckerReport], leaves: Mapping[str, Any], other_bytes: Mapping[str, int]
) -> list[_Item]:
    """Returns the units of all plans and the parameters that are in none, in the parameters' order."""
    items: list[_Item] = []
    reasons: dict[str, str] = {}
    for report in reports:
        reasons |= {path: "no factors: no entries" for path, _ in report.plan.empty}
        reasons |= {parameter.path: f"no factors: {parameter.reason}" for parameter in report.plan.rest}
        for unit, places in zip(report.plan.units, report.plan.placements, strict=True):
            blocks = tuple([_blocks(report, place.stack, place.count) for place in places])
            others = sum(other_bytes.get(path, 0) for path in unit.paths)
            items.append(_Item(unit.name, unit.paths, unit.shapes, blocks, others))
    in_units = {path for item in items for path in item.paths}
    for path, leaf in leaves.items():
        if path not in in_units:
            none = _Blocks(0, (), reasons.get(path, "–"), "", 0)
            items.append(_Item(path, (path,), (jnp.shape(leaf),), (none,), other_bytes.get(path, 0)))
    position = {path: index for index, path in enumerate(leaves)}
    return sorted(items, key=lambda item: position.get(item.paths[0], len(leaves)))


def _blocks(report: KroneckerReport, index: int, count: int) -> _Blocks:
    """Returns `count` blocks of one of a plan's stacks."""
    stack, state = report.plan.stacks[index], report.state.stacks[index]
    # All structures are the same for an axis of length one.
    structures = [structure.name for structure in stack.structures if structure.dim > 1] or ["diagonal"]
    factors = getattr(state.block, "factors", None) or ()
    dtypes = [leaf.dtype.name.replace("float", "f") for axis in factors for leaf in jax.tree.leaves(axis)[:1]]
    length = len(state.size)
    return _Blocks(count, stack.shape, _distinct(structures), _distinct(dtypes), count * _bytes(state) // length)


def _rows(items: Sequence[_Item]) -> Iterator[Row]:
    """Yields the rows of the items, those together that differ only by numbers in their names."""
    alike: dict[_Item, list[_Item]] = {}
    plain = plain_paths(item.name for item in items)
    for item in items:
        kind = dataclasses.replace(item, name=re.sub(r"\d+", "*", plain[item.name]), paths=())
        alike.setdefault(kind, []).append(item)
    names = [_common_path([plain[item.name] for item in members]) for members in alike.values()]
    for name, (kind, members) in zip(names, alike.items(), strict=True):
        if names.count(name) > 1:  # layers 0 and 2 are alike, and so are 1 and 3, but not 0 and 1
            name = f"{plain[members[0].name]}, …"
        for blocks in kind.blocks:
            others = kind.other_bytes if blocks is kind.blocks[0] else 0
            yield Row(
                parameters=tuple([item.name for item in members]),
                name=name or "·",
                shape=_of(len(members), " + ".join(map(_times, kind.shapes))),
                blocks=_of(len(members) * blocks.count, _times(blocks.shape)) if blocks.count else "",
                structure=blocks.structure,
                dtype=blocks.dtype,
                state_bytes=len(members) * (blocks.state_bytes + others),
            )


def _bytes_outside_stacks(state: Any, params: Any) -> Mapping[str, int]:
    """Returns the bytes that a state has of each parameter outside of stacks.

    These are the leaves whose key path ends as the parameter's. In what a Kronecker transformation keeps for parameters
    without factors, that is one key.
    """
    ends: dict[tuple[Any, ...], tuple[str, Shape]] = {}
    names = plain_paths(trees.named_leaves(params))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = trees.path_of(keys)
        ends |= dict.fromkeys([(jax.tree_util.DictKey(names[path]),), keys], (path, jnp.shape(leaf)))
    total: collections.Counter[str] = collections.Counter()
    is_stack = lambda node: isinstance(node, StackState)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_stack):
        found = next((end for start in range(len(keys) + 1) if (end := keys[start:]) in ends), None)
        if is_stack(leaf) or found is None:
            continue
        path, shape = ends[found]
        if found or leaf.shape == shape:  # every key path ends as that of a tree that is one array
            total[path] += _bytes(leaf)
    return total


def _compile(
    tx: optax.GradientTransformation,
    gradients: Any,
    state: tuple[list[Any], Any],
    params: Any,
    extra_args: Mapping[str, Any],
) -> Compiled:
    """Returns what the compiler says of one update, given the shapes of the state's arrays, and its structure."""
    arrays, structure = state
    takes_any = inspect.Parameter.VAR_KEYWORD in [p.kind for p in inspect.signature(tx.update).parameters.values()]
    extra = extra_args or ({"batch_size": 1.0} if takes_any else {})  # of no influence on the program
    is_sharded = any(isinstance(getattr(leaf, "sharding", None), NamedSharding) for leaf in jax.tree.leaves(params))
    if is_sharded:
        with_sharding = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        arrays = list(map(with_sharding, arrays, jax.tree.leaves(state_shardings(tx, params))))
    with use_mesh_of(params):
        # Lists of arrays, as a class of the user's may refuse to hold what `lower` knows of them.
        structures = jax.tree.structure(gradients), structure, jax.tree.structure(params)
        update = jax.jit(lambda *leaves: tx.update(*map(jax.tree.unflatten, structures, leaves), **extra))
        compiled = update.lower(jax.tree.leaves(gradients), arrays, jax.tree.leaves(params)).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Compiled(
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        flops=int(costs["flops"]) if "flops" in costs else None,
    )


def _total(costs: Sequence[tuple[BlockFlops | None, int]]) -> BlockFlops | None:
    """Returns the sum of operations, each so many times; None if some are unknown."""
    known = [[number * count for number in flops] for flops, count in costs if flops is not None]
    return BlockFlops(*map(sum, zip((0, 0, 0), *known, strict=True))) if len(known) == len(costs) else None


def _in_words(intervals: Sequence[RefreshEvery | None]) -> tuple[str, ...]:
    """Returns when something is due, without repetition."""

    def words(interval: RefreshEvery) -> str:
        match interval:
            case Staggered(period):
                return f"spread over {period} steps"
            case 1:
                return "at every step"
            case int():
                return f"every {interval} steps"
            case _:
                return "at steps that the program decides"

    return tuple(dict.fromkeys(words(interval) for interval in intervals if interval is not None))


def _bytes(tree: Any) -> int:
    return sum(math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))


def _common_path(names: Sequence[str]) -> str:
    """Returns a key path with an asterisk for each number in which the given ones differ."""
    tokens = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(token[0] if len(set(token)) == 1 else "*" for token in tokens)


def _distinct(names: Sequence[str]) -> str:
    """Returns one name if all are the same, and else all of them."""
    return ", ".join(names if len(set(names)) > 1 else names[:1])


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _of(count: int, what: str) -> str:
    return what if count == 1 else f"{count} of {what}"

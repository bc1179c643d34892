"""Carries a state over to parameters of other names, or to an optimizer of other options."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rootfree_optax._src.common import trees
from rootfree_optax._src.transforms.origin import Origin


def migrate(
    state: Any, tx: optax.GradientTransformation, params: optax.Params, renamed: Mapping[str, str] | None = None
) -> Any:
    """Returns a state for an optimizer and parameters that goes on from one of another optimizer or other names.

    What belongs to a parameter is carried over where both states keep it in the same form: blocks of one shape and
    structure, arrays of one shape. What is new starts as `tx.init(params)` does, what is gone is dropped, and dtypes
    and places are those of `tx.init(params)`. Counts go on.

    Args:
      state: a state of arrays, with Optax's wrappers where `tx` has them.
      tx: the optimizer that is to go on.
      params: its parameters.
      renamed: from old key paths to new ones: of parameters, or of all that is below, such as {"layer_0": "block_0"}. A
        parameter that has the old path of a renamed one is new, unless it is renamed, too.

    Returns:
      The state.

    Raises:
      ValueError: if no state of this package is where `tx` keeps one, or `renamed` has a key path that is in neither;
        for blocks that follow shards, see `move_state`.

    Example:
      >>> import jax, jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.sirf_muon(1e-3)
      >>> params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
      >>> updates, state = tx.update(jax.tree.map(lambda p: p + jnp.eye(4), params), tx.init(params), params)
      >>> new = {"b": params["b"], "z": params["a"]}
      >>> migrated = rf.migrate(state, tx, new, {"a": "z"})
      >>> old_k, new_k = rf.factors(state, params)["a"][0], rf.factors(migrated, new)["z"][0]
      >>> bool((old_k == new_k).all()) and int(migrated[0].count) == 1
      True
    """
    names = _Names(
        {_plain(old): _plain(new) for old, new in (renamed or {}).items()},
        frozenset(trees.named_leaves(params)),
    )
    fresh = tx.init(params)
    old, new = _origins(state), _origins(fresh)
    if not old.keys() & new.keys():
        raise ValueError(
            f"the state must have states of this package where the optimizer has them, at {sorted(new)}, but has them "
            f"at {sorted(old)}. Give both the same wrappers."
        )
    names.require(old.values(), new.values())
    arrays = {trees.path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state)}
    ends = [trees.path_of(keys[-1:]) for keys, _ in jax.tree_util.tree_leaves_with_path((state, fresh))]
    if "number" in ends:  # of the blocks, where shards order them
        raise ValueError(
            "migrate needs blocks in the order of the parameters, but shards order these. Move the state to parameters "
            "that are not sharded first, by rf.move_state(state, tx, params), and give migrate such parameters."
        )
    stacks = {
        place: source
        for state_place in new.keys() & old.keys()
        for place, source in _sources(state_place, old[state_place], new[state_place], names)
    }

    def carry(path: str, fresh: jax.Array) -> jax.Array:
        if (place := next(filter(path.startswith, stacks), None)) is not None:
            source, index = stacks[place]
            found = None if source is None else arrays.get(source + path.removeprefix(place))
            return fresh if found is None else _take(found, index, fresh)
        candidates = [arrays[name] for name in names.before_leaf(path) if name in arrays]
        return candidates[0].astype(fresh.dtype) if candidates and candidates[0].shape == fresh.shape else fresh

    def carry_beside(keys: Any, fresh: Any) -> Any:
        if isinstance(fresh, Origin):
            return fresh
        carried = carry(trees.path_of(keys), fresh)
        return jax.device_put(carried, fresh.sharding) if fresh.committed else carried

    return jax.tree.map_with_path(carry_beside, fresh, is_leaf=lambda node: isinstance(node, Origin))


class _Names(NamedTuple):
    """From old key paths to new ones.

    Attributes:
      renamed: without a leading "params/".
      parameters: the new key paths.
    """

    renamed: dict[str, str]
    parameters: frozenset[str]

    def before(self, name: str) -> Iterator[str]:
        """Yields what the key path of a parameter, or the name of a group, may have been."""
        plain = _plain(name)
        head, below = name.removesuffix(plain), f"{plain}/"
        for old, new in self.renamed.items():
            if below.startswith(f"{new}/"):
                yield head + old + plain.removeprefix(new)
        if not any(below.startswith(f"{old}/") for old in self.renamed):  # else another has its old name now
            yield name

    def before_leaf(self, path: str) -> Iterator[str]:
        """Yields the key paths that a leaf of the state may have had. Its path ends with that of its parameter."""
        parts = path.split("/")
        for start in range(len(parts)):
            if (name := "/".join(parts[start:])) in self.parameters or f"params/{name}" in self.parameters:
                yield from (path.removesuffix(name) + before for before in self.before(name))
                return
        yield path

    def require(self, old: Any, new: Any) -> None:
        """Raises a ValueError for a name that no parameter has, before or after."""
        for names, origins in ((self.renamed.keys(), old), (self.renamed.values(), new)):
            paths = {path for origin in origins for path in origin}
            for name in names:
                if not any(f"{path}/".find(f"{name}/") in (0, len("params/")) for path in paths):
                    raise ValueError(f"renamed must map parameters to parameters, got {name!r}: there is none.")


def _plain(path: str) -> str:
    return path.removeprefix("params/")


def _origins(tree: Any) -> dict[str, dict[str, Any]]:
    """Returns the parameters of every state of this package, by its place in a tree."""
    is_origin = lambda node: isinstance(node, Origin)
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_origin)
    return {
        trees.path_of(keys).removesuffix("origin"): json.loads(node.text)["parameters"]
        for keys, node in found
        if is_origin(node)
    }


def _blocks(parameters: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Returns for each stack, by its kind of block, the indices of each unit's blocks: see `layout.stack.place`."""
    stacks: dict[str, dict[str, np.ndarray]] = {}
    for name, unit in parameters.items():
        for (count, shape), structures in zip(unit.get("block_size", ()), unit.get("structure", ()), strict=True):
            members = stacks.setdefault(json.dumps([shape, structures, unit["factor_dtype"]]), {})
            members[name] = sum(map(len, members.values())) + np.arange(count)
    return stacks


def _sources(
    place: str, old: Mapping[str, Any], new: Mapping[str, Any], names: _Names
) -> Iterator[tuple[str, tuple[str | None, np.ndarray]]]:
    """Yields each new stack's place, that of the old one with such blocks, and each block's index there, or −1."""
    before = _blocks(old)
    for number, (kind, units) in enumerate(_blocks(new).items()):
        members = before.get(kind, {})
        index = []
        for unit, own in units.items():
            found = next((members[name] for name in names.before(unit) if name in members), own[:0])
            index.append(found if len(found) == len(own) else np.full_like(own, -1))
        source = f"{place}stacks/{[*before].index(kind)}/" if members else None
        yield f"{place}stacks/{number}/", (source, np.concatenate(index))


def _take(old: jax.Array, index: np.ndarray, fresh: jax.Array) -> jax.Array:
    """Returns an array of blocks: the old ones at an index, and fresh ones where that is −1, or for padding."""
    padded = np.concatenate([index, np.full(len(fresh) - len(index), -1)])
    is_old = (padded >= 0).reshape(-1, *(1,) * (fresh.ndim - 1))
    return jnp.where(is_old, jnp.take(old, np.maximum(padded, 0), axis=0).astype(fresh.dtype), fresh)

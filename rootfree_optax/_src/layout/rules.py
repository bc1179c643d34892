"""The user's rules: the structure and dtype of each factor, and how many axes index layers."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.common.validate import require_at_least, require_floating_dtype
from rootfree_optax._src.structures import StructureFactory, structure_factory

Key = TypeVar("Key")
Value = TypeVar("Value")

AxisStructure: TypeAlias = str | StructureFactory
AxesStructure: TypeAlias = AxisStructure | tuple[AxisStructure, ...]
StructureRule: TypeAlias = (
    str | tuple[AxisStructure, ...] | Mapping[int, AxesStructure] | Callable[[str, Shape], AxesStructure | None] | None
)
AxesDType: TypeAlias = DTypeLike | tuple[DTypeLike | None, ...] | None
DTypeRule: TypeAlias = AxesDType | Mapping[int, AxesDType]
LayerRule: TypeAlias = int | Mapping[str, int] | Callable[[str, Shape], int] | None


class FrozenMapping(Mapping[Key, Value]):
    """A mapping that cannot change, has a hash, and remembers its order."""

    def __init__(self, mapping: Mapping[Key, Value]) -> None:
        """Copies a mapping whose keys and values are hashable."""
        self._items = dict(mapping)
        self._hash = hash(tuple(self._items.items()))

    def __getitem__(self, key: Key) -> Value:
        """Returns the value of a key."""
        return self._items[key]

    def __iter__(self) -> Iterator[Key]:
        """Iterates over the keys, in order."""
        return iter(self._items)

    def __len__(self) -> int:
        """Returns the number of keys."""
        return len(self._items)

    def __hash__(self) -> int:
        """Returns the hash of the items, in order."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Returns whether the other has the same items in the same order."""
        return isinstance(other, FrozenMapping) and list(self.items()) == list(other.items())

    def __repr__(self) -> str:
        """Returns what a dictionary would."""
        return repr(self._items)


def frozen(rule: Any) -> Any:
    """Returns a rule with mappings, and lists within them, made immutable."""
    if isinstance(rule, Mapping):
        return FrozenMapping({key: frozen(value) for key, value in rule.items()})
    return tuple(rule) if isinstance(rule, list) else rule


def require_structure_rule(rule: StructureRule) -> None:
    """Raises a ValueError or TypeError for a rule that is none, or that names an unknown structure."""
    if isinstance(rule, Mapping):
        for ndim, structure in rule.items():
            if not isinstance(ndim, int) or ndim < 1:
                raise ValueError(
                    f"structure must map numbers of axes, at least 1, to structures; got the key {ndim!r}."
                )
            names = structure if isinstance(structure, tuple) else (structure,) * ndim
            _factories(names, ndim, f"parameters of {ndim} axes")
    elif isinstance(rule, tuple):
        _factories(rule, len(rule), "structure")
    elif isinstance(rule, str):
        structure_factory(rule)
    elif rule is not None and not callable(rule):
        raise TypeError(f"structure must be None, a name, a tuple, a mapping or a callable, got {rule!r}.")


def structures_of(rule: StructureRule, path: str, lengths: Shape) -> tuple[StructureFactory, ...] | None:
    """Returns the structure that a rule gives each axis of a parameter, None where the default rule decides.

    Args:
      rule: the user's rule.
      path: the parameter's key path.
      lengths: of its axes, squeezed and merged.

    Raises:
      ValueError: that names the path, for a structure that is unknown or not given, or as many as there are not axes.
    """
    structure: AxesStructure | None
    if isinstance(rule, Mapping):
        if len(lengths) not in rule:
            raise ValueError(f"structure must have an entry for {path!r}, of {_axes(lengths)}; it has {sorted(rule)}.")
        structure = rule[len(lengths)]
    elif callable(rule):
        structure = rule(path, lengths)
    else:
        structure = rule
    if structure is None:
        return None
    names = tuple(structure) if isinstance(structure, (tuple, list)) else (structure,) * len(lengths)
    if len(names) != len(lengths):
        raise ValueError(
            f"structure must name one structure for each axis of {path!r}, which has {_axes(lengths)}; got {names}. "
            "Axes are counted after those of length one are dropped and small ones merged."
        )
    return _factories(names, len(lengths), repr(path))


def _axes(lengths: Shape) -> str:
    return f"{len(lengths)} {'axis' if len(lengths) == 1 else 'axes'} {lengths}"


def _factories(names: Sequence[AxisStructure], ndim: int, owner: str) -> tuple[StructureFactory, ...]:
    if len(names) != ndim:
        raise ValueError(f"structure must name {ndim} structures for {owner}, got {tuple(names)}.")
    try:
        return tuple(structure_factory(name) for name in names)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} It was given for {owner}.") from None


def dtypes_of(rule: DTypeRule, axes: int, default: DTypeLike = jnp.float32) -> tuple[jnp.dtype, ...]:
    """Returns the dtype of each factor of a block.

    Args:
      rule: a dtype for every axis; a tuple with one for each axis; or a mapping from the number of axes to either.
        None, anywhere, and a number of axes that is not in the mapping stand for the default.
      axes: the block's number of axes.
      default: the dtype where the rule names none.

    Raises:
      ValueError: for a tuple of another length, or a dtype that is not real floating point.
    """
    if isinstance(rule, Mapping):
        rule = rule.get(axes)
    dtypes = tuple(rule) if isinstance(rule, (tuple, list)) else (rule,) * axes
    if len(dtypes) != axes:
        raise ValueError(f"preconditioner_dtype must have one dtype per axis of a block with {axes}, got {dtypes}.")
    require_dtype_rule(dtypes)
    return tuple(jnp.dtype(default if dtype is None else dtype) for dtype in dtypes)


def require_dtype_rule(rule: DTypeRule) -> None:
    """Raises a ValueError for a rule that names a dtype that is not real floating point."""
    for per_axes in rule.values() if isinstance(rule, Mapping) else [rule]:
        for dtype in per_axes if isinstance(per_axes, (tuple, list)) else [per_axes]:
            require_floating_dtype("preconditioner_dtype", dtype)


def require_layer_rule(rule: LayerRule) -> None:
    """Raises a ValueError or TypeError for a rule that is none."""
    if isinstance(rule, Mapping):
        for pattern in rule:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"stacked must map regular expressions, got the key {pattern!r}: {error}.") from None
    elif rule is not None and not isinstance(rule, int) and not callable(rule):
        raise TypeError(f"stacked must be None, an integer, a mapping or a callable, got {rule!r}.")
    require_at_least("stacked", rule, 0)


def layers_of(rule: LayerRule, path: str, shape: Shape) -> int:
    """Returns how many leading axes of a parameter index layers: by the first expression that its path contains.

    Raises:
      ValueError: that names the path, for a number that is negative or more than the parameter's axes.
    """
    if isinstance(rule, Mapping):
        layers = next((layers for pattern, layers in rule.items() if re.search(pattern, path)), 0)
    elif callable(rule):
        layers = rule(path, shape)
    else:
        layers = rule or 0
    if not isinstance(layers, int) or not 0 <= layers <= len(shape):
        raise ValueError(
            f"stacked must give {path!r}, of shape {shape}, between 0 and {len(shape)} layer axes, got {layers!r}."
        )
    return layers

"""The user's rules: which axes index layers, which parameters have factors, and their structures and dtypes."""

import dataclasses
import numbers
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.common.validate import require_floating_dtype
from rootfree_optax._src.layout.paths import require_expression
from rootfree_optax._src.structures.names import StructureFactory, structure_factory

Key = TypeVar("Key")
Value = TypeVar("Value")

AxisStructure: TypeAlias = str | StructureFactory
AxesStructure: TypeAlias = AxisStructure | tuple[AxisStructure, ...]
StructureRule: TypeAlias = (
    str | tuple[AxisStructure, ...] | Mapping[int, AxesStructure] | Callable[[str, Shape], AxesStructure | None] | None
)
AxesDType: TypeAlias = DTypeLike | tuple[DTypeLike | None, ...] | None
DTypeRule: TypeAlias = AxesDType | Mapping[int, AxesDType]
DiagonalRule: TypeAlias = str | Callable[[str, Shape], bool] | None
LayerAxes: TypeAlias = int | tuple[int, ...] | None
LayerRule: TypeAlias = LayerAxes | Mapping[str, LayerAxes] | Callable[[str, Shape], LayerAxes]


@dataclasses.dataclass(frozen=True, repr=False)
class FrozenMapping(Mapping[Key, Value]):
    """A hashable mapping. Two are equal if they have the same pairs of keys and values in the same order."""

    pairs: tuple[tuple[Key, Value], ...]

    def __getitem__(self, key: Key) -> Value:
        """Returns the value of a key."""
        return dict(self.pairs)[key]

    def __iter__(self) -> Iterator[Key]:
        """Iterates over the keys, in order."""
        return (key for key, _ in self.pairs)

    def __len__(self) -> int:
        """Returns the number of keys."""
        return len(self.pairs)

    def __repr__(self) -> str:
        """Returns the representation of a dictionary."""
        return repr(dict(self.pairs))


def freeze(rule: Any) -> Any:
    """Returns a rule with immutable mappings and tuples in place of mappings and lists."""
    if isinstance(rule, Mapping):
        return FrozenMapping(tuple((key, freeze(value)) for key, value in rule.items()))
    return tuple(rule) if isinstance(rule, list) else rule


def require_structure_rule(rule: StructureRule) -> None:
    """Raises a ValueError or TypeError for an invalid rule or an unknown structure."""
    if isinstance(rule, Mapping):
        for ndim, structure in rule.items():
            if not isinstance(ndim, numbers.Integral) or ndim < 1:
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
    """Returns the structure of each axis of a parameter, or None to leave it to the default rule.

    Args:
      rule: the user's rule.
      path: the parameter's key path.
      lengths: the lengths of its axes, squeezed and merged.

    Raises:
      ValueError: for an unknown or missing structure, or if the number of structures differs from the number of axes.
        The message names the path.
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


def factor_dtypes_of(rule: DTypeRule, owner: str, axes: int) -> tuple[jnp.dtype | None, ...]:
    """Returns the dtype of each factor of a block, or None for the default.

    Args:
      rule: a dtype for every axis, a tuple with one for each axis, or a mapping from the number of axes to either.
      owner: whose block it is.
      axes: the block's number of axes.

    Raises:
      ValueError: if the number of dtypes differs from the number of axes.
    """
    if isinstance(rule, Mapping):
        rule = rule.get(axes)
    dtypes = rule if isinstance(rule, tuple) else (rule,) * axes
    if len(dtypes) != axes:
        raise ValueError(
            f"factor_dtype must have one dtype per axis of a block with {axes}, got {dtypes}. The block belongs to "
            f"{owner!r}."
        )
    return tuple(None if dtype is None else jnp.dtype(dtype) for dtype in dtypes)


def require_dtype_rule(rule: DTypeRule) -> None:
    """Raises a ValueError for a dtype that is not real floating point, or a key that is not a number of axes."""
    if isinstance(rule, Mapping) and not all(isinstance(ndim, numbers.Integral) and ndim >= 1 for ndim in rule):
        raise ValueError(f"factor_dtype must map numbers of axes, at least 1, to dtypes; got the keys {list(rule)}.")
    for per_axes in rule.values() if isinstance(rule, Mapping) else [rule]:
        for dtype in per_axes if isinstance(per_axes, tuple) else [per_axes]:
            require_floating_dtype("factor_dtype", dtype)


def require_layer_rule(rule: LayerRule) -> None:
    """Raises a ValueError or TypeError for an invalid rule."""
    if isinstance(rule, Mapping):
        for pattern, positions in rule.items():
            require_expression("a key of layer_axes", pattern)
            if positions is not None and not _are_positions(positions):
                raise TypeError(
                    "layer_axes must map to the position of an axis, a tuple of positions, or None, got "
                    f"{positions!r} for {pattern!r}."
                )
    elif rule is not None and not callable(rule) and not _are_positions(rule):
        raise TypeError(
            f"layer_axes must be None, an integer, a tuple of integers, a mapping or a callable, got {rule!r}."
        )


def _are_positions(value: Any) -> bool:
    positions = value if isinstance(value, tuple) else (value,)
    return all(isinstance(position, numbers.Integral) and not isinstance(position, bool) for position in positions)


def layer_axes_of(rule: LayerRule, path: str, shape: Shape) -> tuple[int, ...]:
    """Returns the positions of a parameter's layer axes, counted from the first axis.

    Args:
      rule: the user's rule.
      path: the parameter's key path.
      shape: the parameter's shape.

    Raises:
      ValueError: for a position out of range, or the same axis twice. The message names the path.
    """
    if isinstance(rule, Mapping):
        found = next((positions for pattern, positions in rule.items() if re.search(pattern, path)), None)
    elif callable(rule):
        found = rule(path, shape)
    else:
        found = rule
    positions = () if found is None else tuple(found) if isinstance(found, (tuple, list)) else (found,)
    ndim = len(shape)
    if not _are_positions(positions) or not all(-ndim <= position < ndim for position in positions):
        allowed = f"integers from {-ndim} to {ndim - 1}" if ndim else "none, as it has no axes"
        raise ValueError(
            f"layer_axes must be positions of axes of {path!r}, of shape {shape}: {allowed}; got {found!r}."
        )
    axes = tuple(position % ndim for position in positions)
    if len(set(axes)) < len(axes):
        raise ValueError(f"layer_axes must be distinct axes of {path!r}, of shape {shape}, got {found!r}.")
    return axes


def require_diagonal_rule(rule: DiagonalRule) -> None:
    """Raises a ValueError or TypeError for an invalid rule."""
    if isinstance(rule, str):
        require_expression("diagonal", rule)
    elif rule is not None and not callable(rule):
        raise TypeError(f"diagonal must be None, a regular expression or a callable, got {rule!r}.")


def reason_without_factors(rule: DiagonalRule, path: str, shape: Shape) -> str | None:
    """Returns why a parameter has no factors under a rule, or None if it may have some."""
    if isinstance(rule, str):
        found = re.search(rule, path)
        return None if found is None else f"{found[0]!r} in its key path"
    return "chosen by the callable" if rule is not None and rule(path, shape) else None

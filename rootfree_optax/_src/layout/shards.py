"""How parameters are sharded, and cuts that follow their shards.

A cut follows if blocks and shards nest: a block is a whole number of shards, or a shard a whole number of blocks. Then
a block has few holders, the devices that have a part of it, and whoever of them owns it needs to hear from no others.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rootfree_optax._src.common.meshes import Spec, mesh_in_use, named_sharding, names_of, typed_spec
from rootfree_optax._src.common.trees import Shape, named_leaves, path_of
from rootfree_optax._src.layout.paths import plain_paths
from rootfree_optax._src.layout.rules import FrozenMapping

AUTO_BLOCK_SIZE = 512
# Cuts that leave this part of a device's blocks as padding, or less, are as good as even ones.
_ENOUGH = 1.04


def read_specs(specs: Any) -> FrozenMapping[str, NamedSharding | PartitionSpec] | None:
    """Returns the shardings or specs of a tree by key path, as patterns see it.

    Args:
      specs: a tree of `PartitionSpec`s, `NamedSharding`s, or arrays or shapes with such; or what this returns.

    Raises:
      TypeError: for a leaf of any other kind.
    """
    if specs is None or isinstance(specs, FrozenMapping):
        return specs
    is_spec = lambda node: isinstance(node, PartitionSpec | jax.sharding.Sharding)
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec):
        sharding = leaf if is_spec(leaf) else named_sharding(leaf) or getattr(leaf, "sharding", leaf)
        if callable(sharding):  # a function in a model
            continue
        if not is_spec(sharding):
            raise TypeError(
                "specs must be a tree of PartitionSpecs, NamedShardings or sharded arrays, got "
                f"{leaf!r} at {path_of(keys)!r}."
            )
        found[path_of(keys)] = sharding if isinstance(sharding, NamedSharding | PartitionSpec) else PartitionSpec()
    plain = plain_paths(found)
    return FrozenMapping(tuple((plain[path], sharding) for path, sharding in found.items()))


def shards_of(
    specs: FrozenMapping[str, NamedSharding | PartitionSpec] | None, params: Any, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Spec], dict[str, int]]:
    """Returns what divides the axes of sharded parameters, by key path, and the sizes of the mesh axes.

    Args:
      specs: what was told, see `read_specs`; None: what the parameters' types say.
      params: the parameters.
      shapes: of those that are arrays, by key path.

    Raises:
      ValueError: for a parameter of which nothing was told, or names that are not those of the mesh in use.
    """
    leaves = named_leaves(params)
    told = {} if specs is None else dict(specs.pairs)
    if specs is None:
        found = {path: typed_spec(leaves[path]) for path in shapes}
    else:
        plain = plain_paths(shapes)
        if missing := [path for path in shapes if plain[path] not in told]:
            raise ValueError(
                f"specs must have a PartitionSpec for every parameter, but {missing[0]!r} is missing. "
                "PartitionSpec() stands for one that every device has whole."
            )
        found = {path: names_of(told[plain[path]], len(shape)) for path, shape in shapes.items()}
    sharded = {path: spec for path, spec in found.items() if any(spec)}
    if not sharded:
        return {}, {}
    mesh = mesh_in_use((params, told))
    sizes = {} if mesh is None else dict(mesh.shape)
    if unknown := {name for spec in sharded.values() for names in spec for name in names} - sizes.keys():
        where = "there is none" if mesh is None else f"the one in use has the axes {tuple(sizes)}"
        raise ValueError(
            f"specs need a mesh with the axes {sorted(unknown)}, but {where}. Call within `with jax.set_mesh(mesh):`."
        )
    return sharded, sizes


def carriers(shape: Shape, layer_axes: Sequence[int], lengths: Shape) -> tuple[int | None, ...]:
    """Returns for each axis of [*layers, *lengths] the parameter's axis that starts there, or None.

    Those of the parameter's axes that are no layers were reshaped to `lengths`.
    """
    starts, product = {}, 1
    for axis in (axis for axis in range(len(shape)) if axis not in layer_axes):
        if shape[axis] > 1:
            starts[product] = axis
        product *= shape[axis]
    products = itertools.accumulate(lengths, lambda total, length: total * length, initial=1)
    return (*layer_axes, *(starts.get(product) for product, _ in zip(products, lengths, strict=False)))


def carry(spec: Spec, carried: Sequence[int | None], lengths: Shape, sizes: Mapping[str, int]) -> Spec:
    """Returns what divides axes of the given lengths that begin with those of a parameter, see `carriers`."""
    names = [() if axis is None else spec[axis] for axis in carried]
    return tuple(
        of_axis if n % count_shards(of_axis, sizes) == 0 else () for of_axis, n in zip(names, lengths, strict=True)
    )


def count_shards(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Returns into how many parts mesh axes divide an axis."""
    return math.prod(sizes[name] for name in names)


def nests(length: int, piece: int, shards: int) -> bool:
    """Returns whether pieces and shards of an axis nest."""
    shard = length // shards
    return length % shards == 0 and length % piece == 0 and (piece % shard == 0 or shard % piece == 0)


def keep_nested(spec: Spec, lengths: Sequence[int], pieces: Sequence[int], sizes: Mapping[str, int]) -> Spec:
    """Returns what divides axes cut into pieces, without the axes whose pieces and shards do not nest."""
    of_axes = zip(spec, lengths, pieces, strict=True)
    return tuple(names if nests(length, piece, count_shards(names, sizes)) else () for names, length, piece in of_axes)


def even_piece(length: int, block_size: int | None) -> int:
    """Returns the length of an axis's blocks, the last of which may be shorter, whatever the shards.

    Blocks of exactly `block_size` could leave a last one of a single row, with a factor of its own. Lengths that are
    multiples of 16 suit the matrix units of accelerators.
    """
    if block_size is None or length <= block_size:
        return length
    blocks = math.ceil(length / block_size)
    equal = math.ceil(length / blocks)
    rounded = math.ceil(equal / 16) * 16
    last = length - (blocks - 1) * rounded
    return rounded if rounded <= block_size and 2 * last >= rounded else equal


def nested_pieces(lengths: Shape, shards: Sequence[int], whole: Sequence[bool], tensors: int, devices: int) -> Shape:
    """Returns the lengths of blocks that nest with the shards, and of which the holders get almost equally many.

    Of those between a quarter of 512 and 512, the widest blocks are taken, then the largest.

    Args:
      lengths: of a tensor's axes.
      shards: into how many parts each axis is divided.
      whole: which axes are not to be cut.
      tensors: how many such tensors a device has parts of.
      devices: over which blocks are divided, for each part of the tensor.
    """

    def cost(pieces: Shape) -> tuple[float, int, int]:
        of_axes = list(zip(lengths, shards, pieces, strict=True))
        holders = devices * math.prod(max(piece // (length // parts), 1) for length, parts, piece in of_axes)
        count = tensors * math.prod(max(math.ceil(length // parts / piece), 1) for length, parts, piece in of_axes)
        waste = math.ceil(count / holders) * holders / count
        return max(waste, _ENOUGH), -min(pieces), -math.prod(pieces)

    return min(itertools.product(*map(_candidates, lengths, shards, whole)), key=cost)


def _candidates(length: int, shards: int, whole: bool) -> list[int]:
    """Returns the lengths that an axis's blocks may have."""
    sizes = [AUTO_BLOCK_SIZE >> halvings for halvings in range(3)]
    if whole:
        return [length]
    if shards > 1:
        shard = length // shards
        nesting = [
            *(shard * count for count in range(1, shards + 1) if shards % count == 0),
            *(shard // count for count in range(2, shard + 1) if shard % count == 0),
        ]
        fitting = [piece for piece in nesting if sizes[-1] <= piece <= sizes[0] or piece == length <= sizes[0]]
        if fitting:
            return fitting
    return list(dict.fromkeys(even_piece(length, size) for size in sizes))

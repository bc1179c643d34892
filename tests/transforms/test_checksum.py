"""The checksum: every bit counts, the mesh does not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import refuses
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rootfree_optax as rf


@pytest.mark.parametrize("dtype", ["bool", "uint8", "bfloat16", "float32", "complex64", "int32"])
def test_every_bit_counts(dtype: str) -> None:
    rng = np.random.default_rng(0)
    array = np.array(jnp.asarray(rng.integers(0, 2, 6), dtype))
    before = int(rf.checksum([jnp.ones(3), array]))
    bits = array.view(np.uint8)
    for place in range(0, bits.size, 3):
        for bit in range(1 if dtype == "bool" else 8):
            bits[place] ^= 1 << bit
            assert int(rf.checksum([jnp.ones(3), array])) != before
            bits[place] ^= 1 << bit
    assert int(rf.checksum([jnp.ones(3), array])) == before


def test_places_count() -> None:
    """A flipped bit in a compressed file of a symmetric factor often swaps words, or moves a repeated run."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, 8, 8)).astype(np.float32)
    array[:, 0] = 1  # few bits differ from those of the zeros
    array[:, 1] = 0
    swapped = [array, array[::-1], array.swapaxes(1, 2), np.roll(array, 1, axis=2), np.roll(array, 256)]
    swapped += [array[:, order] for order in ([1, 0, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 7, 6])]
    sums = [int(rf.checksum([jnp.ones(3), other])) for other in swapped]
    sums += [int(rf.checksum([array, jnp.ones(3)])), int(rf.checksum([jnp.ones(3), array.ravel()[:-64]]))]
    assert len(set(sums)) == len(sums)


@pytest.mark.contract
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_it_is_the_same_where_blocks_follow_the_shards(kind: AxisType) -> None:
    """Then the order of the blocks differs between meshes, and a damaged number of one counts."""
    values = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)
    spec, sums = PartitionSpec("x", "y"), []
    for sizes in ((1, 1), (2, 2), (4, 2)):
        devices = jax.devices()[: math.prod(sizes)]
        mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=(kind, kind), devices=devices)
        layout = rf.Layout(block_size=4, specs={"w": spec} if kind is AxisType.Auto else None)
        tx = rf.sirf_muon(0.1, layout=layout, mesh_axes=("x", "y"))
        params = {"w": jax.device_put(values, NamedSharding(mesh, spec))}
        with jax.set_mesh(mesh):
            state = tx.init(params)
            sums.append(int(rf.checksum((params, state))))
    assert len(set(sums)) == 1
    numbers = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if getattr(path[-1], "name", "") == "number"
    ]
    assert len(numbers) == 1  # the last mesh has them
    damaged = jax.tree.map(lambda leaf: leaf + 1 if leaf is numbers[0] else leaf, state)
    assert int(rf.checksum((params, damaged))) != sums[0]


def test_it_is_the_same_on_every_mesh_and_check_compares_it() -> None:
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 4)), jnp.float32)}
    tx = rf.sirf_muon(0.1, layout=rf.Layout(block_size=4), mesh_axes="data")
    sums = []
    for devices in (1, 2):  # of three blocks, two devices have one of padding
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        state = tx.init(placed)
        sums.append(int(rf.checksum((placed, state))))
    assert sums[0] == sums[1]
    rf.check(state, tx, placed, sums[0])
    with refuses(ValueError, str(sums[0]), "damaged"):
        rf.check(state, tx, jax.tree.map(lambda p: p.at[0].set(0), placed), sums[0])

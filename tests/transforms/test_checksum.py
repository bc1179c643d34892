"""The checksum: every bit counts, the mesh does not."""

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

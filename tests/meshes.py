"""Parameters that no mesh divides evenly, the meshes that tests put them on, and how."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rootfree_optax as rf

# Eight blocks of 4×4, four of 3×4 and one vector.
SHAPES = {"up": (4, 16), "down": (16, 4), "odd": (6, 8), "bias": (16,)}
LAYOUT = rf.Layout(block_size=4, merge_dims=None, diagonal=None)
SETTINGS = {"batch_size": 4, "refresh_every": 2, "layout": LAYOUT, "weight_decay": 0.1, "damping": 0.1}
FSDP = {"up": (None, "data"), "down": ("data",), "odd": (None, "data"), "bias": ("data",)}
TENSOR = {"up": ("data", "model"), "down": ("model", "data"), "odd": (None, "data"), "bias": ("model",)}


def draw(seed: int) -> dict[str, jax.Array]:
    """Returns arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def mesh_of(kind: AxisType, *sizes: int, devices: int = 8) -> jax.sharding.Mesh:
    """Returns a mesh of one or two axes."""
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes), devices=jax.devices()[:devices])


def shardings_on(mesh: jax.sharding.Mesh, specs: dict[str, Any]) -> dict[str, NamedSharding]:
    """Returns the shardings on a mesh."""
    return {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}

"""A small training run with checkpoints, as one process or as one of several: what test_pods.py starts.

python tests/pod_worker.py FOLDER STEPS --coordinator localhost:PORT --process 0 --fall 6
"""

import argparse
import functools
import os
import pathlib
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rootfree_optax as rf

SHAPES = {"up": (8, 16), "down": (16, 8), "odd": (24, 4), "bias": (16,)}
SPECS = {"up": (None, "data"), "down": ("data",), "odd": ("data",), "bias": ("data",)}
SAVE_EVERY = 2


def optimizer(mesh_axes: str | tuple[str, ...] = "data", told: bool = False) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer: 4×4 blocks, of which no stack but one divides by eight; told the shards, if that is so."""
    specs = {name: PartitionSpec(*spec) for name, spec in SPECS.items()} if told else None
    layout = rf.Layout(block_size=4, specs=specs)
    return rf.sirf_shampoo(0.05, refresh_every=2, layout=layout, mesh_axes=mesh_axes, weight_decay=0.1)


def shapes_on(mesh: jax.sharding.Mesh, specs: dict[str, tuple[Any, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the parameters' shapes, with shardings on a mesh."""
    place = lambda name: NamedSharding(mesh, PartitionSpec(*specs[name]))
    return {name: jax.ShapeDtypeStruct(SHAPES[name], jnp.float32, sharding=place(name)) for name in SHAPES}


def normal(seed: int, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns arrays with normally distributed entries, each device making its own part."""
    rng = np.random.default_rng(seed)
    whole = {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    return {
        name: jax.make_array_from_callback(shape.shape, shape.sharding, whole[name].__getitem__)
        for name, shape in like.items()
    }


def target_of(tx: optax.GradientTransformation, shapes: Any) -> Any:
    """Returns shapes and shardings of parameters and state, into which a checkpoint is restored."""
    structs = (shapes, jax.eval_shape(tx.init, shapes))
    shardings = (jax.tree.map(lambda shape: shape.sharding, shapes), rf.state_shardings(tx, shapes))
    place = lambda struct, sharding: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
    return jax.tree.map(place, structs, shardings)


def restore(manager: ocp.CheckpointManager, tx: optax.GradientTransformation, shapes: Any, step: int) -> Any:
    """Returns parameters and state of a step. Not strict: the number of padding blocks depends on the mesh."""
    return manager.restore(step, args=ocp.args.StandardRestore(target_of(tx, shapes), strict=False))


def train(
    folder: pathlib.Path,
    steps: int,
    mesh: jax.sharding.Mesh,
    specs: dict[str, tuple[Any, ...]] = SPECS,
    mesh_axes: str | tuple[str, ...] = "data",
    before_save: Any = lambda step: None,
    told: bool = False,
) -> dict[str, Any]:
    """Trains from the last checkpoint in a folder on, saving every second step; returns parameters and state."""
    tx, shapes = optimizer(mesh_axes, told), shapes_on(mesh, specs)
    shardings = jax.tree.map(lambda struct: struct.sharding, target_of(tx, shapes))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def step(carry: Any, target: Any) -> Any:
        params, state = carry
        gradients = jax.grad(lambda p: sum(jnp.sum(jnp.sin(p[n]) * target[n] + p[n] ** 2) for n in p))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=True)) as manager:
        first = manager.latest_step() or 0
        if first:
            carry = restore(manager, tx, shapes, first)
        else:
            params = normal(0, shapes)
            carry = params, jax.jit(tx.init, out_shardings=shardings[1])(params)
        for number in range(first + 1, steps + 1):
            carry = jax.block_until_ready(step(carry, normal(number, shapes)))
            if number % SAVE_EVERY == 0:
                before_save(number)
                manager.save(number, args=ocp.args.StandardSave(carry))
    return carry


def fall_at(step: int, folder: pathlib.Path) -> Any:
    """Returns what ends this process as a power cut would, in the middle of the save of a step."""

    def fall() -> None:
        while not unfinished(folder, step):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(number: int) -> None:
        if number == step:  # a save ends when all processes have written, so this one is still within
            threading.Thread(target=fall, daemon=True).start()

    return watch


def unfinished(folder: pathlib.Path, step: int) -> list[str]:
    """Returns the names of the saves of a step that have begun and not ended."""
    return [path.name for path in folder.glob(f"{step}.*")]


def main() -> None:
    """Runs one process of several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--fall", type=int, default=0, help="the step at whose save this process ends")
    parser.add_argument("--told", action="store_true", help="blocks follow the shards")
    options = parser.parse_args()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, num_processes=2, process_id=options.process)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    before_save = fall_at(options.fall, options.folder)
    train(options.folder, options.steps, mesh, before_save=before_save, told=options.told)


if __name__ == "__main__":
    main()

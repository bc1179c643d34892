"""Checkpoints move between meshes, and two processes train as one, even if one of them ends midway."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pod_worker
import pytest
from checks import assert_close
from jax.sharding import AxisType

STEPS = 10
TENSOR = {**pod_worker.SPECS, "up": ("data", "model"), "down": ("model", "data")}


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    names = ("data", "model")[: len(sizes)]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    """A folder with the checkpoints of ten steps on eight devices, and the last parameters."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    params, _ = pod_worker.train(folder, STEPS, mesh_of(8))
    return folder, jax.device_get(params)


@pytest.mark.contract
def test_training_goes_on_on_other_meshes(uninterrupted: Any, tmp_path: pathlib.Path) -> None:
    folder, expected = uninterrupted
    shutil.copytree(folder / "2", tmp_path / "2")
    # On the way stacks of padding blocks are cut short, and grow again by blocks of zeros.
    for steps, sizes, specs, axes in [
        (4, (4,), pod_worker.SPECS, "data"),
        (6, (1,), pod_worker.SPECS, "data"),
        (STEPS, (2, 4), TENSOR, ("data", "model")),
    ]:
        mesh = mesh_of(*sizes)
        params, state = pod_worker.train(tmp_path, steps, mesh, specs, axes)
        for part in jax.tree.leaves(state[0].stacks):
            assert part.sharding.num_devices == mesh.size
            assert part.sharding.shard_shape(part.shape)[0] == part.shape[0] // mesh.size
    assert_close(jax.device_get(params), expected)


def start(folder: pathlib.Path, *options: str, fall: int = 0) -> list[subprocess.Popen[str]]:
    """Starts two processes of four devices; the second ends itself at the save of the step `fall`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"  # the last number counts
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    common = [sys.executable, pod_worker.__file__, str(folder), str(STEPS), "--coordinator", coordinator, *options]
    return [
        subprocess.Popen(
            [*common, "--process", str(process), "--fall", str(fall * process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]


@pytest.mark.processes
def test_two_processes_train_as_one_and_go_on_after_one_was_killed(uninterrupted: Any, tmp_path: pathlib.Path) -> None:
    folder, expected = uninterrupted
    survivor, fallen = start(tmp_path, fall=6)
    fallen.communicate(timeout=120)
    assert fallen.returncode == -signal.SIGKILL
    survivor.kill()  # as a scheduler does when one process of a job has ended
    survivor.communicate(timeout=120)
    assert len(pod_worker.unfinished(tmp_path, 6)) == 1
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 4

    mesh = mesh_of(8)
    tx, shapes = pod_worker.optimizer(), pod_worker.shapes_on(mesh, pod_worker.SPECS)
    with ocp.CheckpointManager(folder) as alone, ocp.CheckpointManager(tmp_path) as together:
        of_one, of_two = (pod_worker.restore(manager, tx, shapes, 4) for manager in (alone, together))
    assert_close(jax.device_get(of_two), jax.device_get(of_one))

    for process in start(tmp_path):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    with ocp.CheckpointManager(tmp_path) as manager:
        params, _ = pod_worker.restore(manager, tx, shapes, STEPS)
    assert_close(jax.device_get(params), expected)


@pytest.mark.processes
def test_two_processes_exchange_the_blocks_that_they_hold_parts_of(uninterrupted: Any, tmp_path: pathlib.Path) -> None:
    _, expected = uninterrupted
    for process in start(tmp_path, "--told"):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    tx, shapes = pod_worker.optimizer(told=True), pod_worker.shapes_on(mesh := mesh_of(8), pod_worker.SPECS)
    with jax.set_mesh(mesh), ocp.CheckpointManager(tmp_path) as manager:
        params, state = pod_worker.restore(manager, tx, shapes, STEPS)
    assert all(stack.number is not None for stack in state[0].stacks)
    assert_close(jax.device_get(params), expected)

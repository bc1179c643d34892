"""Trains a transformer on the Python standard library's sources, its parameters and state sharded over a mesh.

    python examples/pod_training.py
    python examples/pod_training.py --simulate 8 --tensor 2
    python examples/pod_training.py --coordinator host:1234 --processes 2 --process 0 --output SHARED_FOLDER

The mesh has two axes: over 'data', mini-batches and all matrices are sharded (FSDP), over 'model' (--tensor devices
wide) heads and hidden units. The blocks of SIRF-Shampoo are divided over both. In a folder it saves checkpoints, from
which the same command goes on, even on another mesh, and writes pod_training.png and pod_training.json.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import language_model
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reporting import progress_bar

import rootfree_optax as rf

AXES = ("data", "model")


def make_mesh(tensor: int) -> jax.sharding.Mesh:
    """Returns a mesh of all devices of all processes, `tensor` of them along 'model'."""
    devices = jax.device_count()
    if devices % tensor:
        raise ValueError(f"--tensor must divide the number of devices, {devices}, got {tensor}.")
    return jax.make_mesh((devices // tensor, tensor), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def make_optimizer(steps: int, batch_size: int) -> optax.GradientTransformationExtraArgs:
    """Returns SIRF-Shampoo with schedules of both step sizes, decaying matrices alone, its blocks over the mesh."""
    learning_rate = optax.warmup_cosine_decay_schedule(0.0, 3e-4, max(1, steps // 20), max(2, steps))
    preconditioner_lr = optax.linear_schedule(0.3, 0.1, steps)
    decays = lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    return rf.sirf_shampoo(
        learning_rate,
        preconditioner_lr=preconditioner_lr,
        damping=1e-5,
        weight_decay=1e-2,
        mask=decays,
        batch_size=batch_size,
        layout=rf.Layout(block_size=64),
        block_axes=AXES,
    )


def targets_of(tx: optax.GradientTransformation, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns shapes and shardings of parameters and optimizer state: what is compiled for, and restored into."""
    of_params = language_model.shardings_of(params, mesh)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    params = jax.tree.map(place, params, of_params)
    state = jax.tree.map(place, jax.eval_shape(tx.init, params), rf.state_shardings(tx, params))
    return params, state


def make_step(
    tx: optax.GradientTransformation, structure: nnx.GraphDef, shardings: Any
) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """Returns the compiled step, (parameters and state, tokens) -> (parameters and state, loss)."""

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, gradients = jax.value_and_grad(functools.partial(language_model.mean_loss, structure))(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return step


def train(options: argparse.Namespace, mesh: jax.sharding.Mesh, manager: ocp.CheckpointManager) -> list[float]:
    """Returns the losses of all steps, those before the last checkpoint as it tells them."""
    sizes = language_model.Sizes(options.layers, options.width, options.heads, options.length)
    structure, params = language_model.make_params(sizes)
    tx = make_optimizer(options.steps, options.batch_size)
    targets = targets_of(tx, params, mesh)
    shardings = jax.tree.map(lambda struct: struct.sharding, targets)
    first, losses = manager.latest_step() or 0, []
    if first:
        # Not strict: how many blocks the stacks are padded by depends on the mesh.
        restored = manager.restore(
            first,
            args=ocp.args.Composite(
                carry=ocp.args.StandardRestore(targets, strict=False), losses=ocp.args.JsonRestore()
            ),
        )
        carry, losses = restored["carry"], list(restored["losses"])
    else:
        params = jax.device_put(params, shardings[0])
        carry = params, jax.jit(tx.init, out_shardings=shardings[1])(params)
    step = make_step(tx, structure, shardings)
    source, _ = language_model.text()
    by_sequence = NamedSharding(mesh, PartitionSpec("data"))
    with progress_bar() as bar:
        task = bar.add_task("training", total=options.steps, completed=first, status="compiling")
        for number in range(first + 1, options.steps + 1):
            tokens = language_model.batch(source, number, options.batch_size, options.length, by_sequence)
            carry, loss = step(carry, tokens)
            losses.append(float(loss))
            bar.update(task, advance=1, status=f"loss {losses[-1]:.3f}")
            if number % options.save_every == 0 or number == options.steps:
                saved = ocp.args.Composite(carry=ocp.args.StandardSave(carry), losses=ocp.args.JsonSave(losses))
                manager.save(number, args=saved)
    evaluate(options, structure, carry[0], by_sequence, losses)
    return losses


def evaluate(
    options: argparse.Namespace, structure: nnx.GraphDef, params: Any, sharding: NamedSharding, losses: list[float]
) -> None:
    """Writes the validation loss and the curve; the first process does."""
    _, held_out = language_model.text()
    loss = jax.jit(functools.partial(language_model.mean_loss, structure))
    batches = [
        language_model.batch(held_out, number, options.batch_size, options.length, sharding) for number in range(8)
    ]
    validation = float(np.mean([loss(params, tokens) for tokens in batches]))
    if jax.process_index():
        return
    record = {"steps": len(losses), "devices": jax.device_count(), "validation_loss": validation, "losses": losses}
    (options.output / "pod_training.json").write_text(json.dumps(record) + "\n")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(1, len(losses) + 1), losses, color="#56B4E9", linewidth=0.5, label="each mini-batch")
    axes.plot(np.arange(window, len(losses) + 1), smooth, color="#0072B2", label=f"mean of {window}")
    axes.axhline(validation, color="#595959", linestyle="--", label=f"validation at the end, {validation:.2f}")
    axes.set(xlabel="step", ylabel="cross-entropy per byte", title="SIRF-Shampoo on the standard library's sources")
    axes.legend(frameon=False)
    figure.savefig(options.output / "pod_training.png", dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[float]:
    """Runs the command line; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences, over all devices (%(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="devices along 'model' (%(default)s)")
    for name, default in vars(language_model.Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("pod_training"), metavar="FOLDER")
    parser.add_argument("--simulate", type=int, metavar="N", help="so many devices on a single processor")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes, the first one's address")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which one this is")
    options = parser.parse_args(arguments)
    if options.simulate:
        jax.config.update("jax_num_cpu_devices", options.simulate)
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    options.output = options.output.absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(options.tensor)
    settings = ocp.CheckpointManagerOptions(max_to_keep=2)
    with jax.set_mesh(mesh), ocp.CheckpointManager(options.output / "checkpoints", options=settings) as manager:
        return train(options, mesh, manager)


if __name__ == "__main__":
    main()

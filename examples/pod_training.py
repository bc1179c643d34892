"""Trains a transformer on the Python standard library's sources, parameters and state sharded over a mesh.

    python examples/pod_training.py --simulate 8 --mesh 4 2
    python examples/pod_training.py --distributed --mesh 64 4 --output SHARED_FOLDER    # in every process of a pod

Blocks follow the shards. Run again, it goes on, on any mesh. It takes about a minute on two processor cores.
"""

import argparse
import functools
import pathlib

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import rootfree_optax as rf

WIDTH, HEADS, LAYERS, LENGTH, VOCABULARY, BATCH_SIZE, SAVE_EVERY = 64, 4, 2, 64, 256, 32, 50  # bytes, sequences, steps


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm, self.feedforward_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.attention_norm(x)
        heads = [project(y).reshape(*y.shape[:2], HEADS, -1) for project in (self.query, self.key, self.value)]
        x = x + self.out(jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.feedforward_norm(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding, self.positions = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.layers = nnx.List(Layer(rngs) for _ in range(LAYERS))
        self.norm, self.head = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.positions(np.arange(LENGTH))[None]
        for layer in self.layers:
            x = layer(jax.lax.with_sharding_constraint(x, PartitionSpec("data")))  # activations go by sequence
        return self.head(self.norm(x))


def sharding_of(mesh: jax.sharding.Mesh, path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Shards the width over "data", and heads, hidden units and bytes over "model"; vectors are replicated."""
    axes = ("model", "data") if any(n in str(path) for n in ("out", "down", "emb", "pos")) else ("data", "model")
    return NamedSharding(mesh, PartitionSpec(*axes) if leaf.ndim == 2 else PartitionSpec())


def draw(text: np.ndarray, step: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """Returns a step's tokens [BATCH_SIZE, LENGTH + 1], the same ones however many processes and devices there are."""
    starts = np.random.default_rng(step).integers(0, len(text) - LENGTH - 1, BATCH_SIZE)
    tokens = text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
    return jax.make_array_from_callback(tokens.shape, NamedSharding(mesh, PartitionSpec("data")), tokens.__getitem__)


def train(steps: int, mesh: jax.sharding.Mesh, folder: pathlib.Path) -> list[float]:
    """Returns the losses of the steps from the last checkpoint in a folder on."""
    structure, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(nnx.Rngs(0))))
    params = jax.tree.map_with_path(lambda path, leaf: leaf.update(sharding=sharding_of(mesh, path, leaf)), shapes)
    layout = rf.Layout(block_size=64, specs=params)  # the number pins the cuts: they are the same on every mesh
    tx = rf.sirf_muon(1e-2, layout=layout, mesh_axes=mesh.axis_names)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params), rf.state_shardings(tx, params)

    def mean_loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(structure, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*shardings, None))
    def train_step(params: nnx.State, state: optax.OptState, tokens: jax.Array):
        loss, gradients = jax.value_and_grad(mean_loss)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def restore(manager: ocp.CheckpointManager, step: int):
        [sizes] = manager.restore(step, args=ocp.args.Composite(mesh=ocp.args.JsonRestore())).values()
        with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(sizes), mesh.axis_names, axis_types=mesh.axis_types)):
            state = jax.eval_shape(tx.init, shapes)  # where its blocks are depends on the mesh that it was saved on
        saved = params, jax.tree.map(lambda leaf: leaf.update(sharding=NamedSharding(mesh, PartitionSpec())), state)
        found = manager.restore(step, args=ocp.args.Composite(training=ocp.args.StandardRestore(saved)))["training"]
        return found[0], rf.move_state(found[1], tx, found[0])

    start = lambda: (params := nnx.state(Transformer(nnx.Rngs(0))), tx.init(params))
    files = sorted(pathlib.Path(argparse.__file__).parent.glob("*.py"))  # the standard library's
    text, losses = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8), []
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(SAVE_EVERY)) as manager:
        first = manager.latest_step() or 0
        params, state = restore(manager, first) if first else jax.jit(start, out_shardings=shardings)()
        for step in range(first + 1, steps + 1):
            params, state, loss = train_step(params, state, draw(text, step, mesh))
            losses.append(float(loss))
            if jax.process_index() == 0 and step % 10 == 0:
                print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
            saved = {"training": ocp.args.StandardSave((params, state)), "mesh": ocp.args.JsonSave(mesh.devices.shape)}
            manager.save(step, args=ocp.args.Composite(**saved), force=step == steps)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mesh", type=int, nargs=2, metavar=("DATA", "MODEL"), help="sizes (all devices, 1)")
    parser.add_argument("--output", type=pathlib.Path, default="results/pod_training", help="folder of checkpoints")
    parser.add_argument("--simulate", type=int, default=-1, metavar="N", help="so many devices on a processor")
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.simulate)
    if options.distributed:
        jax.distributed.initialize()
    mesh = jax.make_mesh(options.mesh or (jax.device_count(), 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        train(options.steps, mesh, options.output)

"""Programs for TPU topologies, compiled ahead of time without a TPU: bytes, operations and traffic of each chip."""

import dataclasses
import functools
import importlib
import importlib.util
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from decoders import loss
from harness import program, report
from harness.collectives import traffic
from harness.flops import product_flops
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import rootfree_optax as rf
from rootfree_optax._src.blocks.sirf import PublishedRefresh
from rootfree_optax._src.layout.stack import Stack

LENGTH = 2048
EVEN = 1.25  # the busiest chip's work over the mean, at most: how few blocks are too few

# The topology of each tree: its name, and the mesh's sizes, of which a second one is for tensor parallelism.
PODS = {
    "125M": (("v5e:4x4", (16,)), ("v5e:4x4", (4, 4))),
    "1.3B": (("v5e:4x4", (16,)), ("v5e:16x16", (256,)), ("v5e:16x16", (16, 16))),
    "7B": (("v5e:16x16", (256,)), ("v5e:16x16", (16, 16))),
    "70B": (("v5p:8x8x8", (512,)), ("v5p:8x8x8", (64, 8))),
}
TITLE = "{program} of the {tree} decoder, {parameters:.2f} billion float32 parameters, on {topology} as {mesh}"
CAPTION = (
    "Per chip. published: rf.published.sirf_shampoo; all factors in bfloat16. state: of the optimizer; /plan: the "
    "factors' over the plan's bytes / chips. arguments: parameters, state and what else is given. temporary: what is "
    "needed besides. GFLOP: of the factors' products in a step with refresh, of no others and of the model's none. "
    "busiest: the most factor work of a chip over the mean. collectives: ag all-gather, ar all-reduce, a2a "
    "all-to-all, cp permute, rs reduce-scatter; sent: bytes of their results, over the chip's float32 gradient; in "
    "refresh: of those within the branch that refreshes. compile, process: time of tracing and compiling, by the clock "
    "and of all threads, which other work on the machine changes less."
)
COLUMNS = (
    report.Column("method", "method"),
    report.Column("state_bytes", "state\nMB", ".1f", 1e-6),
    report.Column("state_ratio", "state\n/plan", ".3f"),
    report.Column("argument_bytes", "argu-\nments", ".1f", 1e-6),
    report.Column("temporary_bytes", "tempo-\nrary", ".1f", 1e-6),
    report.Column("product_flops", "GFLOP", ".1f", 1e-9),
    report.Column("busiest", "busi-\nest", ".3f"),
    report.Column("collectives", "collectives"),
    report.Column("sent_ratio", "sent\n/grad.", ".2f"),
    report.Column("sent_in_refresh", "in re-\nfresh", ".0f"),
    report.Column("compile_seconds", "compile\ns", ".1f"),
    report.Column("compile_process_seconds", "process\ns", ".1f"),
)
BALANCE_TITLE = "How evenly padded stacks divide, factors and momenta in bfloat16"
BALANCE_CAPTION = (
    "factors: bytes on a chip, with momenta and padding; /plan: over the plan's bytes / chips. busiest: the most "
    "factor work of a chip, refresh and application, over the mean without padding."
)
BALANCE_COLUMNS = (
    report.Column("tree", "tree"),
    report.Column("chips", "chips", ".0f"),
    report.Column("block_size", "block\nsize", ".0f"),
    report.Column("blocks", "blocks", ".0f"),
    report.Column("stacks", "stacks", ".0f"),
    report.Column("factor_bytes", "factors\nMB", ".1f", 1e-6),
    report.Column("state_ratio", "factors\n/plan", ".3f"),
    report.Column("busiest", "busiest", ".3f"),
)
_SHORT = {
    "all-gather": "ag",
    "all-reduce": "ar",
    "all-to-all": "a2a",
    "collective-permute": "cp",
    "reduce-scatter": "rs",
}


def mesh_of(topology: str, sizes: Sequence[int]) -> Mesh:
    """Returns a mesh of the chips of a TPU topology, none of which need exist."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    names = ("data", "model")[: len(sizes)]
    return Mesh(np.array(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(sizes))


def stack_of_layers() -> dict[str, Any]:
    """Returns the shapes of the matrices of 12 layers of width 768: 144 blocks of 768×768."""
    d = 768
    layer = {**dict.fromkeys(("query", "key", "value", "out"), (d, d)), "up": (d, 4 * d), "down": (4 * d, d)}
    return {f"layer_{index}": dict(layer) for index in range(12)}


def layer_specs() -> dict[str, Any]:
    """Returns their shardings, each matrix's side of width 768 over 'data'."""
    into, out_of = PartitionSpec("data"), PartitionSpec(None, "data")
    layer = {"query": into, "key": into, "value": into, "out": out_of, "up": into, "down": out_of}
    return {f"layer_{index}": dict(layer) for index in range(12)}


def placed(shapes: Any, specs: Any, mesh: Mesh) -> Any:
    """Returns float32 `jax.ShapeDtypeStruct`s with shardings; an axis that a mesh axis does not divide stays whole."""
    is_shape = lambda node: isinstance(node, tuple)

    def place(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        names = [*spec, *(None for _ in shape[len(spec) :])]
        divides = lambda name, length: name is not None and length % mesh.shape[name] == 0
        entries = [name if divides(name, length) else None for name, length in zip(names, shape, strict=True)]
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*entries)))

    return jax.tree.map(place, shapes, specs, is_leaf=is_shape)


def factors_everywhere(layout: rf.Layout) -> rf.Layout:
    """Returns the layout with factors for every parameter, as the published method has them."""
    return dataclasses.replace(layout, diagonal=None)


def methods(layout: rf.Layout, mesh_axes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the optimizers by name, each made when called; psgd's only where psgdax is installed."""
    settings = {"layout": layout, "mesh_axes": mesh_axes}
    everywhere = {"layout": factors_everywhere(layout), "mesh_axes": mesh_axes}
    published = functools.partial(rf.published.sirf_shampoo, 1e-3, batch_size=256, **everywhere)
    others = {"adamw": lambda: optax.adamw(1e-3), "muon": lambda: optax.contrib.muon(1e-3)}
    if importlib.util.find_spec("psgdax") is not None:
        others["psgd"] = lambda: importlib.import_module("psgdax").kron(1e-3)
    return {
        **others,
        "published": published,
        "published, T=10": lambda: published(refresh_every=10),
        "sirf_shampoo": functools.partial(rf.sirf_shampoo, 1e-3, **settings),
        "kl_shampoo": functools.partial(rf.kl_shampoo, 1e-3, **settings),
        "sirf_muon": functools.partial(rf.sirf_muon, 1e-3, **settings),
    }


def measure(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    layout: rf.Layout | None,
    tokens: Any = None,
    *,
    apply: bool = True,
) -> dict[str, Any]:
    """Returns what one compiled step costs a chip.

    Args:
      tx: the optimizer.
      params: `jax.ShapeDtypeStruct`s with shardings.
      layout: of the Kronecker method, or None for another.
      tokens: for a whole training step, its input; without, the gradients are given.
      apply: whether the step's updates are added to parameters; else they are its result.
    """
    structs = jax.eval_shape(tx.init, params)
    shardings = rf.state_shardings(tx, params)
    place = lambda struct, sharding: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
    state = jax.tree.map(place, structs, shardings)

    def step(params: Any, state: Any, given: Any) -> Any:
        gradients = given if tokens is None else jax.grad(loss)(params, given, tokens.sharding)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates) if apply else updates, state

    of_params = jax.tree.map(lambda struct: struct.sharding, params)
    start, process_start = time.perf_counter(), time.process_time()
    jitted = jax.jit(step, donate_argnums=(0, 1) if apply else 1, out_shardings=(of_params, shardings))
    compiled = jitted.lower(params, state, params if tokens is None else tokens).compile()
    seconds, process_seconds = time.perf_counter() - start, time.process_time() - process_start
    memory = compiled.memory_analysis()
    sent, within = traffic(compiled.as_text())
    gradient = chip_bytes(params)
    jaxpr = jax.make_jaxpr(step)(params, state, params if tokens is None else tokens)
    record = {
        "state_bytes": chip_bytes(state),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "gradient_bytes": gradient,
        "flops": compiled.cost_analysis().get("flops"),
        "product_flops": product_flops(jaxpr) or None,  # none of a method without factors
        "collectives": " ".join(f"{number}{_SHORT[kind]}" for kind, number in sorted(sent.count.items())),
        "collective_counts": dict(sent.count),
        "collective_bytes": dict(sent.size),
        "sent_ratio": sent.total_size / gradient,
        "sent_in_refresh": within.total_size,
        "compile_seconds": seconds,
        "compile_process_seconds": process_seconds,
    }
    return record if layout is None else {**record, **_of_plan(layout, params, state)}


def _of_plan(layout: rf.Layout, params: Any, state: Any) -> dict[str, Any]:
    """Returns how evenly the published method's factors, momenta and work are divided: padding makes it uneven."""
    has_factors = lambda node: hasattr(node, "factors")
    blocks = [node for node in jax.tree.leaves(state, is_leaf=has_factors) if has_factors(node)]
    chips = jax.tree.leaves(blocks[0].factors)[0].sharding.num_devices
    owned = [len(jax.tree.leaves(block.factors)[0]) // chips for block in blocks]
    told = balance(layout.plan(params), chips, owned)
    kept = chip_bytes([(block.factors, block.momenta) for block in blocks])
    assert kept == told["factor_bytes"], f"a chip has {kept} bytes of factors, the padding tells {told['factor_bytes']}"
    return told


def balance(plan: rf.Plan, chips: int, owned: Sequence[int] = ()) -> dict[str, Any]:
    """Returns what the published method's factors, momenta and work are, with the padding of stacks.

    Args:
      plan: how parameters become blocks.
      chips: over which the blocks are divided.
      owned: how many blocks of each stack a chip has; by default as few as fit, whoever holds them.
    """
    rule = PublishedRefresh(riemannian_momentum=0.5)

    def kept(stack: Stack) -> int:
        dtypes = [dtype or jnp.dtype(jnp.float32) for dtype in stack.factor_dtypes]
        state = jax.eval_shape(lambda: rule.init(stack.structures, dtypes))
        return stack.count * program.tree_bytes((state.factors, state.momenta))

    work = lambda stack: stack.count * sum(rule.flops(stack.structures))
    owned = owned or [-(-stack.count // chips) for stack in plan.stacks]
    pairs = list(zip(plan.stacks, owned, strict=True))
    of_a_chip = lambda number: sum(number(stack) * blocks // stack.count for stack, blocks in pairs)
    return {
        "factor_bytes": of_a_chip(kept),
        "state_ratio": of_a_chip(kept) * chips / sum(map(kept, plan.stacks)),
        "busiest": of_a_chip(work) * chips / sum(map(work, plan.stacks)),
        "plan_flops": sum(map(work, plan.stacks)) / chips,
        "blocks": len(plan.blocks),
        "stacks": len(plan.stacks),
    }


def chip_bytes(tree: Any) -> int:
    """Returns the bytes of a tree's arrays on one chip."""
    local = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(local, jax.tree.leaves(tree)))

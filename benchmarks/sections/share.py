"""What part of a whole training step the optimizer takes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import trees
from harness import report, turns

from sections import methods

TITLE = "The optimizer's share of a training step, gpt of {layers} layers, width {width}, {tokens} tokens a step"
CAPTION = (
    "step: gradient and update together; update: that alone; share: update/step; difference: 1 − gradient/step, "
    "with the gradient alone. By means over a period of 10 steps; the programs take turns, step by step."
)
COLUMNS = (
    report.Column("method", "method"),
    report.Column("step_seconds", "step\nms", ".1f", 1e3),
    report.Column("update_seconds", "update\nms", ".1f", 1e3),
    report.Column("share", "share\n%", ".1f", 1e2),
    report.Column("gradient_seconds", "gradient\nms", ".1f", 1e3),
    report.Column("difference", "difference\n%", ".1f", 1e2),
)
_HEAD_WIDTH = 64


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _attention(params: Any, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    heads = width // _HEAD_WIDTH
    qkv = (x @ params["qkv"]).reshape(batch, length, 3, heads, _HEAD_WIDTH)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return out.reshape(batch, length, width) @ params["proj"]


def _loss(params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross entropy of a decoder with the shapes of `trees.gpt`, all layers equal in form."""
    x = params["embedding"][tokens[:, :-1]] + params["positions"][: tokens.shape[1] - 1]
    for index in range(sum(name.startswith("layer_") for name in params)):
        layer = params[f"layer_{index}"]
        x = x + _attention(layer["attention"], _norm(x, layer["norms"]["attention"]))
        weights = layer["feedforward"]
        hidden = jax.nn.gelu(_norm(x, layer["norms"]["feedforward"]) @ weights["fc"] + weights["fc_bias"])
        x = x + hidden @ weights["out"] + weights["out_bias"]
    logits = _norm(x, params["final_norm"]) @ params["embedding"].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def measure(
    layers: int, width: int, tokens: int, *, context: int = 256, block_size: int, periods: int, watch: Any = iter
) -> list[dict[str, Any]]:
    """Returns one record per optimizer."""
    shapes = trees.gpt(layers, width, context=context)
    params = trees.normal(shapes, 0.02)
    batch = jax.random.randint(jax.random.key(0), (tokens // context, context + 1), 0, shapes["embedding"][0])
    gradient = jax.jit(jax.grad(_loss))
    kronecker = methods.kronecker_methods(block_size)
    chosen = {name: kronecker[name].make() for name in ("sirf_shampoo", "sirf_shampoo, staggered", "sirf_muon")}
    chosen = {"adamw": optax.adamw(1e-3), **chosen}
    gradients = gradient(params, batch)
    steps = {f"{name}: step": _training_step(tx, params, jax.grad(_loss), batch) for name, tx in chosen.items()}
    given = lambda params, gradients: gradients
    steps |= {f"{name}: update": _training_step(tx, params, given, gradients) for name, tx in chosen.items()}
    steps["gradient"] = turns.timed(lambda _: gradient(params, batch), None)
    times = turns.take_turns(steps, periods, methods.PERIOD, watch)
    seconds = {name: turns.summary(of_method)["mean_seconds"] for name, of_method in times.items()}
    return [
        {
            "method": name,
            "step_seconds": (step := seconds[f"{name}: step"]),
            "update_seconds": (update := seconds[f"{name}: update"]),
            "share": update / step,
            "gradient_seconds": seconds["gradient"],
            "difference": 1 - seconds["gradient"] / step,
        }
        for name in chosen
    ]


def _training_step(
    tx: optax.GradientTransformation, params: Any, gradient: Callable[[Any, Any], Any], given: Any
) -> turns.Step:
    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry: tuple[Any, Any], given: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(gradient(params, given), state, params)
        return optax.apply_updates(params, updates), state

    return turns.timed(lambda carry: train(carry, given), jax.tree.map(jnp.copy, (params, tx.init(params))))

"""Decoder-only transformers of today's shapes, as shapes, shardings and a loss: nothing here is ever allocated.

Layers are stacked along a leading axis and scanned over, as large models are trained. Attention has fewer heads for
keys and values than for queries, the feedforward layers are gated (SwiGLU), and head and embedding are separate.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

HEAD = 128


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder.

    Attributes:
      layers: its depth.
      width: d.
      kv_width: of keys and values, a multiple of the heads' width and a divisor of d.
      hidden: units of the feedforward layers.
      vocabulary: rows of the embedding, columns of the head.
      block_size: of the blocks that divide its matrices well.
    """

    layers: int
    width: int
    kv_width: int
    hidden: int
    vocabulary: int
    block_size: int

    @property
    def shapes(self) -> dict[str, Any]:
        """The parameters' shapes; those below 'layers' have a leading axis of layers."""
        d, kv, hidden = self.width, self.kv_width, self.hidden
        layer = {
            "attention": {"query": (d, d), "key": (d, kv), "value": (d, kv), "out": (d, d)},
            "feedforward": {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)},
            "norms": {"attention": (d,), "feedforward": (d,)},
        }
        stacked = jax.tree.map(lambda shape: (self.layers, *shape), layer, is_leaf=lambda node: isinstance(node, tuple))
        ends = {"embedding": (self.vocabulary, d), "head": (d, self.vocabulary), "norm": (d,)}
        return {**ends, "layers": stacked}

    def specs(self, data: str, model: str | None) -> dict[str, Any]:
        """Returns the parameters' shardings: the model's width over `data`, heads and units over `model`."""
        into, out_of, vector = (None, data, model), (None, model, data), (None, data)
        layer = {
            "attention": {"query": into, "key": into, "value": into, "out": out_of},
            "feedforward": {"gate": into, "up": into, "down": out_of},
            "norms": {"attention": vector, "feedforward": vector},
        }
        ends = {"embedding": (model, data), "head": (data, model), "norm": (data,)}
        to_spec = lambda spec: PartitionSpec(*spec)
        return jax.tree.map(to_spec, {**ends, "layers": layer}, is_leaf=lambda node: isinstance(node, tuple))


DECODERS = {
    "125M": Decoder(12, 768, 256, 2048, 32000, 768),
    "1.3B": Decoder(24, 2048, 512, 5632, 32000, 512),
    "7B": Decoder(32, 4096, 1024, 14336, 32000, 1024),
    "70B": Decoder(80, 8192, 1024, 28672, 128256, 1024),
}


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def _rotated(x: jax.Array) -> jax.Array:
    """Returns queries or keys [batch, length, heads, width] rotated by their positions."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.expand_dims(jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None], (0, 2))
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _layer(x: jax.Array, layer: Any) -> jax.Array:
    layer = jax.tree.map(lambda leaf: leaf.astype(x.dtype), layer)
    attention, feedforward = layer["attention"], layer["feedforward"]
    heads = lambda name, y: (y @ attention[name]).reshape(*y.shape[:2], -1, min(HEAD, attention["key"].shape[-1]))
    y = _normalized(x, layer["norms"]["attention"])
    queries, keys, values = _rotated(heads("query", y)), _rotated(heads("key", y)), heads("value", y)
    attended = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
    x = x + attended.reshape(x.shape) @ attention["out"]
    y = _normalized(x, layer["norms"]["feedforward"])
    return x + (jax.nn.silu(y @ feedforward["gate"]) * (y @ feedforward["up"])) @ feedforward["down"]


def loss(params: Any, tokens: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns the mean cross-entropy of the next token, computed in bfloat16 with layers rematerialised.

    Args:
      params: arrays of `Decoder.shapes`.
      tokens: integers, [batch, length + 1].
      sharding: of all activations. Without it, they would be divided as the parameters are, and summed over devices
        after every product.
    """
    by_sequence = lambda x: jax.lax.with_sharding_constraint(x, sharding)
    layer = jax.checkpoint(lambda x, layer: (by_sequence(_layer(by_sequence(x), layer)), None))
    x, _ = jax.lax.scan(layer, by_sequence(params["embedding"].astype(jnp.bfloat16)[tokens[:, :-1]]), params["layers"])
    logits = by_sequence(_normalized(x, params["norm"].astype(x.dtype)) @ params["head"].astype(x.dtype))
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))

"""A decoder-only transformer in Flax nnx, where its parameters go on a mesh, and text that is on every machine."""

import dataclasses
import functools
import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

VOCABULARY = 256  # bytes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What fixes the network besides its parameters."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    length: int = 64


class Layer(nnx.Module):
    """Causal attention and a gated feedforward network, each after a normalization, in bfloat16."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        """Makes the parameters, in float32."""
        d, self.heads = sizes.width, sizes.heads
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(d, dtype=jnp.bfloat16, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(d, d) for _ in range(4))
        self.feedforward_norm = nnx.RMSNorm(d, dtype=jnp.bfloat16, rngs=rngs)
        self.gate, self.up, self.down = linear(d, 4 * d), linear(d, 4 * d), linear(4 * d, d)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, length, width] to the same."""
        y = self.attention_norm(x)
        split = lambda z: z.reshape(*z.shape[:2], self.heads, -1)
        queries, keys, values = (split(projection(y)) for projection in (self.query, self.key, self.value))
        attended = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        y = self.feedforward_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class LanguageModel(nnx.Module):
    """Predicts the next byte."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        """Makes the parameters, in float32."""
        embed = functools.partial(nnx.Embed, features=sizes.width, dtype=jnp.bfloat16, rngs=rngs)
        self.embedding, self.positions = embed(VOCABULARY), embed(sizes.length)
        self.layers = nnx.List(Layer(sizes, rngs) for _ in range(sizes.layers))
        self.norm = nnx.RMSNorm(sizes.width, dtype=jnp.bfloat16, rngs=rngs)
        self.head = nnx.Linear(sizes.width, VOCABULARY, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens [batch, length] to float32 logits [batch, length, vocabulary]."""
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        for layer in self.layers:
            # Activations go by sequence; else the compiler may take a sharding of parameters over to them.
            x = layer(jax.lax.with_sharding_constraint(x, PartitionSpec("data")))
        return self.head(self.norm(x)).astype(jnp.float32)


def make_params(sizes: Sizes, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """Returns the network's structure and its parameters."""
    return nnx.split(LanguageModel(sizes, nnx.Rngs(seed)))


def mean_loss(structure: nnx.GraphDef, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the cross-entropy of the next byte, a mean over tokens [batch, length + 1]."""
    logits = nnx.merge(structure, params)(tokens[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(chosen)


def shardings_of(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns each parameter's sharding: fully sharded over 'data', and heads and hidden units over 'model', too."""
    back_to_width = ("out", "down", "embedding", "positions")

    def sharding(path: Any, leaf: jax.Array) -> NamedSharding:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        spec = ("model", "data") if set(names) & set(back_to_width) else ("data", "model")
        return NamedSharding(mesh, PartitionSpec(*spec) if leaf.ndim == 2 else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, params)


@functools.cache
def text(most_bytes: int = 4_000_000) -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes of the Python standard library's sources: for training, and the last twentieth for validation."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    content, size = [], 0
    for path in files:
        content.append(path.read_bytes())
        size += len(content[-1])
        if size >= most_bytes:
            break
    everything = np.frombuffer(b"".join(content), np.uint8)[:most_bytes]
    boundary = len(everything) * 19 // 20
    return everything[:boundary], everything[boundary:]


def batch(source: np.ndarray, step: int, size: int, length: int, sharding: NamedSharding) -> jax.Array:
    """Returns the tokens [size, length + 1] of a step, the same however many processes and devices there are."""
    starts = np.random.default_rng(step).integers(0, len(source) - length - 1, size)
    tokens = np.stack([source[start : start + length + 1] for start in starts]).astype(np.int32)
    return jax.make_array_from_callback(tokens.shape, sharding, tokens.__getitem__)

"""A small decoder transformer, in flax nnx.

Between the layers, activations are a matrix with one row per character: XLA computes the gradient of a product of
matrices several times faster on a CPU than that of a product of a matrix with a tensor of three axes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from characters.corpus import VOCABULARY

HEAD_DIM = 32


class Attention(nnx.Module):
    """Causal self-attention with heads of `HEAD_DIM`; queries, keys and values are three matrices."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.query, self.key, self.value, self.output = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array, sequence: int) -> jax.Array:
        """Returns the attended values, [n·sequence, width], of an x of that shape."""
        heads = lambda y: y.reshape(-1, sequence, x.shape[-1] // HEAD_DIM, HEAD_DIM)
        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then two layers with a GELU between them; both normalise their input and add to it."""

    def __init__(self, width: int, expansion: int, *, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = Attention(width, rngs=rngs)
        self.up = nnx.Linear(width, expansion * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(expansion * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, sequence: int) -> jax.Array:
        """Returns the block's output, [n·sequence, width], of an x of that shape."""
        x = x + self.attention(self.attention_norm(x), sequence)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """Learned positions, blocks, a last normalisation, and a matrix of its own for the output."""

    def __init__(self, width: int, layers: int, sequence: int, expansion: int = 4, *, rngs: nnx.Rngs):
        if width % HEAD_DIM:
            raise ValueError(f"width must be a multiple of {HEAD_DIM}, got {width}.")
        self.characters = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.positions = nnx.Embed(sequence, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, expansion, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns the logits of each next character, [n, sequence, VOCABULARY], for text [n, sequence]."""
        sequence = text.shape[-1]
        x = self.characters(text.astype(jnp.int32)) + self.positions(jnp.arange(sequence))
        x = x.reshape(-1, x.shape[-1])
        for block in self.blocks:
            x = block(x, sequence)
        return self.output(self.norm(x)).reshape(*text.shape, VOCABULARY)

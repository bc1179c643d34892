"""The networks, in flax nnx; each maps inputs [n, …] to logits, and its parameters are all its state.

Convolutions are products of image patches with a matrix: under `jax.vmap` over weights these stay batched products.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from digits.network import GROUPS, patches
from flax import nnx


class Convolution(nnx.Module):
    """A 3×3 convolution as a matrix [9·inputs, outputs], then group normalization."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        self.matrix = nnx.Linear(9 * n_in, n_out, use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(n_out, num_groups=GROUPS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, height, width, inputs] to [n, height, width, outputs]."""
        return self.norm(self.matrix(patches(x, 3, 3)))


class VGG(nnx.Module):
    """Convolutions with a ReLU each, pooled in between; then a linear classifier of the mean over pixels."""

    def __init__(self, channels: int, classes: int, widths: Sequence[int], *, rngs: nnx.Rngs):
        sizes = (channels, *widths)
        self.convolutions = nnx.List(Convolution(*pair, rngs=rngs) for pair in zip(sizes, widths, strict=False))
        self.classifier = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [n, height, width, channels] to logits [n, classes]."""
        for index, convolution in enumerate(self.convolutions):
            x = nnx.relu(convolution(x if index == 0 else nnx.avg_pool(x, (2, 2), strides=(2, 2))))
        return self.classifier(x.mean(axis=(1, 2)))


class ResNet(nnx.Module):
    """A convolution, pooling, then residual blocks of two convolutions each."""

    def __init__(self, channels: int, classes: int, width: int, blocks: int, *, rngs: nnx.Rngs):
        self.stem = Convolution(channels, width, rngs=rngs)
        convolution = functools.partial(Convolution, width, width, rngs=rngs)
        self.blocks = nnx.List(nnx.List([convolution(), convolution()]) for _ in range(blocks))
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [n, height, width, channels] to logits [n, classes]."""
        x = nnx.avg_pool(nnx.relu(self.stem(x)), (2, 2), strides=(2, 2))
        for first, second in self.blocks:
            x = nnx.relu(x + second(nnx.relu(first(x))))
        return self.classifier(x.mean(axis=(1, 2)))


class EncoderBlock(nnx.Module):
    """Attention without a mask, then two layers with a GELU; both normalize their input and add to it."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.query, self.key, self.value, self.output = (linear(width, width) for _ in range(4))
        self.up, self.down, self.heads = linear(width, 2 * width), linear(2 * width, width), heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, tokens, width] to the same."""
        y = self.attention_norm(x)
        split = lambda z: z.reshape(*z.shape[:2], self.heads, -1)
        attended = jax.nn.dot_product_attention(split(self.query(y)), split(self.key(y)), split(self.value(y)))
        x = x + self.output(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class VisionTransformer(nnx.Module):
    """Square patches as tokens, learned positions, encoder blocks, and a classifier of the mean over tokens."""

    def __init__(
        self, size: int, channels: int, classes: int, patch: int, width: int, layers: int, heads: int, *, rngs: nnx.Rngs
    ):
        self.patch = patch
        self.embedding = nnx.Linear(patch * patch * channels, width, rngs=rngs)
        self.positions = nnx.Embed((size // patch) ** 2, width, rngs=rngs)
        self.blocks = nnx.List(EncoderBlock(width, heads, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [n, size, size, channels] to logits [n, classes]."""
        n, size, _, channels = images.shape
        side = size // self.patch
        x = images.reshape(n, side, self.patch, side, self.patch, channels).swapaxes(2, 3)
        x = self.embedding(x.reshape(n, side * side, -1)) + self.positions(jnp.arange(side * side))
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(axis=1))


class LSTM(nnx.Module):
    """An embedding, one layer of long short-term memory, and a linear output at every position."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary, embedding, rngs=rngs)
        self.inputs = nnx.Linear(embedding, 4 * hidden, rngs=rngs)
        orthogonal = nnx.initializers.orthogonal()
        self.recurrent = nnx.Linear(hidden, 4 * hidden, use_bias=False, kernel_init=orthogonal, rngs=rngs)
        self.output = nnx.Linear(hidden, vocabulary, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Maps text [n, sequence] to logits [n, sequence, vocabulary]."""
        inputs = self.inputs(self.embedding(text.astype(jnp.int32))).swapaxes(0, 1)
        matrix = self.recurrent.kernel[...]

        def step(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            cell, hidden = carry
            update, forget, candidate, output = jnp.split(x + hidden @ matrix, 4, axis=-1)
            cell = nnx.sigmoid(forget + 1) * cell + nnx.sigmoid(update) * jnp.tanh(candidate)
            hidden = nnx.sigmoid(output) * jnp.tanh(cell)
            return (cell, hidden), hidden

        zeros = jnp.zeros((text.shape[0], matrix.shape[0]), inputs.dtype)
        _, hidden = jax.lax.scan(step, (zeros, zeros), inputs)
        return self.output(hidden.swapaxes(0, 1))


class GraphNetwork(nnx.Module):
    """Learned node features, then two graph convolutions: linear layers after an average over neighbours."""

    def __init__(self, nodes: int, classes: int, width: int, *, rngs: nnx.Rngs):
        self.features = nnx.Embed(nodes, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, nodes: jax.Array, adjacency: jax.Array) -> jax.Array:
        """Maps node numbers [n] and the normalised adjacency [all, all] to logits [n, classes]."""
        x = self.features(jnp.arange(len(adjacency)))
        x = nnx.relu(adjacency @ self.hidden(x))
        return self.output(adjacency @ x)[nodes]

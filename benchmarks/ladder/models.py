"""The networks of the ladder: decoders from 0.2 to 124 million parameters, and a residual network of 0.3 million.

Each is a frozen value with `init`, `draw` (a mini-batch) and `measure` (its loss and error), all of them pure.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ladder.data import Images

Params = dict[str, Any]


def _normalize(x: jax.Array, scale: jax.Array | float = 1.0) -> jax.Array:
    """Returns x [..., d] divided by the root mean square of its last axis, times a scale, in x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def _loss_and_error(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Returns the mean cross-entropy, and the part of the labels that are not the largest logit."""
    logits = logits.astype(jnp.float32)
    error = jnp.mean((jnp.argmax(logits, -1) != labels).astype(jnp.float32))
    if logits.shape[-1] <= 256:  # products with one-hot labels: faster than gathers, side by side on a GPU
        loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": jnp.mean(loss), "error": error}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder: normalized queries and keys, learned positions, separate embedding and head, no biases.

    Attributes:
      layers: its depth.
      width: d.
      heads: a divisor of d.
      context: tokens that it sees.
      batch: tokens of a step, by default.
      dtype: what it computes in; parameters are float32.
      vocabulary: 256 for bytes.
    """

    layers: int
    width: int
    heads: int
    context: int = 64
    batch: int = 2048
    dtype: str = "float32"
    vocabulary: int = 256

    @property
    def hidden_size(self) -> int:
        """How many parameters there are beside embeddings and head, as tokens per parameter are counted."""
        return 12 * self.layers * self.width**2

    def init(self, key: jax.Array) -> Params:
        """Returns parameters drawn with a standard deviation of 0.02, less on the way back into the residual stream."""
        keys = iter(jax.random.split(key, 4 * self.layers + 3))
        normal = lambda *shape, std=0.02: std * jax.random.normal(next(keys), shape)
        d, back = self.width, 0.02 / math.sqrt(2 * self.layers)
        layer = lambda: {
            "attention_norm": jnp.ones(d),
            "qkv": normal(d, 3 * d),
            "out": normal(d, d, std=back),
            "mlp_norm": jnp.ones(d),
            "up": normal(d, 4 * d),
            "down": normal(4 * d, d, std=back),
        }
        return {
            "embed": normal(self.vocabulary, d),
            "pos": normal(self.context, d),
            "head": normal(d, self.vocabulary),
            "norm": jnp.ones(d),
            **{f"layer_{index}": layer() for index in range(self.layers)},
        }

    def draw(self, data: jax.Array, key: jax.Array, batch: int) -> jax.Array:
        """Returns random pieces of the tokens, [sequences, context + 1]."""
        first = jax.random.randint(key, (batch // self.context, 1), 0, data.size - self.context)
        return data[first + jnp.arange(self.context + 1)]

    def measure(self, params: Params, tokens: jax.Array) -> dict[str, jax.Array]:
        """Returns loss and error of the next token, for tokens [sequences, context + 1]."""
        tokens = tokens.astype(jnp.int32)
        inputs, cast = tokens[:, :-1], lambda array: array.astype(self.dtype)
        if self.vocabulary <= 256:
            x = jax.nn.one_hot(inputs, self.vocabulary, dtype=self.dtype) @ cast(params["embed"])
        else:
            x = cast(params["embed"][inputs])
        x = x + cast(params["pos"])
        for index in range(self.layers):
            layer = params[f"layer_{index}"]
            heads = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
            qkv = jnp.split(_normalize(x, layer["attention_norm"]) @ cast(layer["qkv"]), 3, -1)
            query, key, value = map(heads, qkv)
            attended = jax.nn.dot_product_attention(_normalize(query), _normalize(key), value, is_causal=True)
            x = x + attended.reshape(x.shape) @ cast(layer["out"])
            x = x + jax.nn.gelu(_normalize(x, layer["mlp_norm"]) @ cast(layer["up"])) @ cast(layer["down"])
        return _loss_and_error(_normalize(x, params["norm"]) @ cast(params["head"]), tokens[:, 1:])

    def validation(self, tokens: Any, batch: int) -> jax.Array:
        """Returns all of the tokens in batches, [batches, sequences, context + 1]; the last few are left out."""
        sequences = batch // self.context
        count = (len(tokens) - 1) // (self.context * sequences)
        first = self.context * jnp.arange(count * sequences)
        return jnp.asarray(tokens)[first[:, None] + jnp.arange(self.context + 1)].reshape(count, sequences, -1)


@dataclasses.dataclass(frozen=True)
class ResidualNetwork:
    """A residual network of 3×3 convolutions for images of 28 × 28, in three stages of halved resolution.

    Attributes:
      widths: the channels of the stages.
      blocks: residual blocks of each stage.
      batch: images of a step, by default.
    """

    widths: tuple[int, ...] = (32, 64, 96)
    blocks: tuple[int, ...] = (1, 2, 1)
    batch: int = 128

    @property
    def hidden_size(self) -> int:
        """How many parameters there are beside the head."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) - math.prod(shapes["head"].shape)

    def init(self, key: jax.Array) -> Params:
        """Returns kernels [3, 3, channels in, channels out] of He's standard deviation, and scales of one."""
        keys = iter(jax.random.split(key, 100))

        def kernel(size: int, before: int, after: int) -> jax.Array:
            std = math.sqrt(2 / (size**2 * before))
            return std * jax.random.normal(next(keys), (size, size, before, after))

        params: Params = {"stem": kernel(3, 1, self.widths[0])}
        before = self.widths[0]
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for index in range(blocks):
                block = {
                    "norm_1": jnp.ones(before),
                    "conv_1": kernel(3, before, width),
                    "norm_2": jnp.ones(width),
                    "conv_2": kernel(3, width, width),
                }
                if before != width:
                    block["shortcut"] = kernel(1, before, width)
                params[f"block_{stage}_{index}"], before = block, width
        head = jax.random.normal(next(keys), (before, 10)) / math.sqrt(before)
        return {**params, "norm": jnp.ones(before), "head": head}

    def draw(self, data: Images, key: jax.Array, batch: int) -> Images:
        """Returns random images."""
        index = jax.random.randint(key, (batch,), 0, len(data.labels))
        return Images(data.pixels[index], data.labels[index])

    def measure(self, params: Params, images: Images) -> dict[str, jax.Array]:
        """Returns loss and error of the class."""
        x = images.pixels[..., None].astype(jnp.float32) / 128 - 1
        x = _convolve(x, params["stem"], stride=2)
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                block = params[f"block_{stage}_{index}"]
                stride = 2 if "shortcut" in block else 1
                y = jax.nn.relu(_normalize(x, block["norm_1"]))
                x = _convolve(y, block["shortcut"], stride) if "shortcut" in block else x
                y = _convolve(y, block["conv_1"], stride)
                x = x + _convolve(jax.nn.relu(_normalize(y, block["norm_2"])), block["conv_2"])
        features = jnp.mean(jax.nn.relu(_normalize(x, params["norm"])), (1, 2))
        return _loss_and_error(features @ params["head"], images.labels.astype(jnp.int32))

    def validation(self, images: Images, batch: int) -> Images:
        """Returns all images in batches; the last few are left out."""
        count = len(images.labels) // batch
        split = lambda array: jnp.asarray(array[: count * batch]).reshape(count, batch, *array.shape[1:])
        return Images(split(images.pixels), split(images.labels))


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Returns the convolution of x [images, h, w, channels], padded by zeros, as one product of matrices.

    Convolutions with a kernel for each of several runs, side by side, would be grouped ones, which are slow.
    """
    size = kernel.shape[0]
    pad, (height, width) = size // 2, x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifts = [(i, j) for i in range(size) for j in range(size)]
    patches = jnp.concatenate([padded[:, i : i + height : stride, j : j + width : stride] for i, j in shifts], -1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


Model = Decoder | ResidualNetwork

MODELS: dict[str, Model] = {
    "0.2M": Decoder(layers=2, width=96, heads=4),
    "0.6M": Decoder(layers=3, width=128, heads=4),
    "3M": Decoder(layers=4, width=256, heads=8),
    # Sizes are nominal: vocabularies of 8,192 and 50,304 make 34 and 163 million parameters, bytes 26 and 86.
    "33M": Decoder(layers=8, width=512, heads=8, context=512, batch=32_768, dtype="bfloat16"),
    "124M": Decoder(layers=12, width=768, heads=12, context=1024, batch=65_536, dtype="bfloat16"),
    "conv": ResidualNetwork(),
}

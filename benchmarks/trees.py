"""The shapes of models' parameters, and arrays of such shapes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shapes = dict[str, Any]


def gpt(layers: int, width: int = 256, vocabulary: int = 2048, context: int = 256) -> Shapes:
    """Returns a decoder-only transformer's shapes: 8 arrays per layer, and 3 besides.

    Args:
      layers: its depth.
      width: the model's width, d; the feedforward layers have 4·d units.
      vocabulary: rows of the embedding, which is the head too.
      context: rows of the position embedding.
    """
    layer = {
        "attention": {"qkv": (width, 3 * width), "proj": (width, width)},
        "feedforward": {
            "fc": (width, 4 * width),
            "fc_bias": (4 * width,),
            "out": (4 * width, width),
            "out_bias": (width,),
        },
        "norms": {"attention": (width,), "feedforward": (width,)},
    }
    ends = {"embedding": (vocabulary, width), "positions": (context, width), "final_norm": (width,)}
    return {**ends, **{f"layer_{index}": layer for index in range(layers)}}


def vit(layers: int, width: int = 192, patch: int = 16, patches: int = 196, classes: int = 1000) -> Shapes:
    """Returns a vision transformer's shapes: those of `gpt`, with patches in place of a vocabulary, and a head.

    Args:
      layers: its depth.
      width: the model's width.
      patch: the side of a patch, in pixels of three colours.
      patches: how many an image has.
      classes: outputs of the head.
    """
    shapes = gpt(layers, width, context=patches + 1)
    del shapes["embedding"]
    embedding = {"kernel": (patch, patch, 3, width), "bias": (width,)}
    return {
        **shapes,
        "patches": embedding,
        "class_token": (width,),
        "head": {"kernel": (width, classes), "bias": (classes,)},
    }


_BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def resnet(depth: int, width: int = 64, classes: int = 1000) -> Shapes:
    """Returns a residual network's shapes: kernels [height, width, inputs, outputs], normalizations and a head.

    Args:
      depth: 18 or 34.
      width: channels of the first stage; each stage has twice the channels of the one before.
      classes: outputs of the head.
    """
    norm = lambda channels: {"scale": (channels,), "bias": (channels,)}
    shapes: Shapes = {"stem": {"kernel": (7, 7, 3, width), "norm": norm(width)}}
    inputs = width
    for stage, blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
        outputs = width * 2**stage
        for block in range(blocks):
            layers = {
                "conv_1": (3, 3, inputs, outputs),
                "norm_1": norm(outputs),
                "conv_2": (3, 3, outputs, outputs),
                "norm_2": norm(outputs),
            }
            if inputs != outputs:
                layers |= {"shortcut": (1, 1, inputs, outputs), "shortcut_norm": norm(outputs)}
            shapes[f"stage_{stage}_block_{block}"] = layers
            inputs = outputs
    return {**shapes, "head": {"kernel": (inputs, classes), "bias": (classes,)}}


def convolutions(count: int) -> Shapes:
    """Returns so many convolutions of different shapes, every third one 1×1, each with a bias and a scale."""
    channels, generator = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448, 512), np.random.default_rng(0)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        window = (3, 3) if len(drawn) % 3 else (1, 1)
        drawn[(*window, *map(int, generator.choice(channels, 2)))] = None
    return {
        f"layer_{index}": {"kernel": shape, "bias": shape[-1:], "scale": shape[-1:]}
        for index, shape in enumerate(drawn)
    }


def unet(widths: tuple[int, ...] = (64, 128, 256, 512), embedding: int = 256) -> Shapes:
    """Returns a diffusion model's shapes: about 60 convolutions, each stage's skips joined on the way up.

    Args:
      widths: channels of each stage.
      embedding: the width of the time's embedding.
    """

    def block(inputs: int, outputs: int) -> Shapes:
        shortcut = {} if inputs == outputs else {"shortcut": (1, 1, inputs, outputs)}
        norms = {"norm_1": (inputs,), "norm_1_bias": (inputs,), "norm_2": (outputs,), "norm_2_bias": (outputs,)}
        convolutions = {"conv_1": (3, 3, inputs, outputs), "conv_2": (3, 3, outputs, outputs)}
        return convolutions | norms | shortcut | {"time": (embedding, outputs)}

    shapes: Shapes = {"first": (3, 3, 3, widths[0]), "time": (widths[0], embedding), "last": (3, 3, widths[0], 3)}
    inputs, skips = widths[0], [widths[0]]
    for stage, width in enumerate(widths):
        for index in range(2):
            shapes[f"down_{stage}_{index}"] = block(inputs, width)
            inputs = width
            skips.append(width)
        if stage + 1 < len(widths):
            shapes[f"down_{stage}"] = (3, 3, width, width)
            skips.append(width)
        if stage >= 2:
            shapes[f"attention_{stage}"] = {"qkv": (width, 3 * width), "out": (width, width)}
    shapes["middle"] = block(inputs, inputs)
    for stage, width in reversed(list(enumerate(widths))):
        for index in range(3):
            shapes[f"up_{stage}_{index}"] = block(inputs + skips.pop(), width)
            inputs = width
        if stage:
            shapes[f"up_{stage}"] = (3, 3, width, width)
    return shapes


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def shapes_of(shapes: Shapes) -> list[tuple[int, ...]]:
    """Returns the shapes, in the order of the leaves."""
    return jax.tree.leaves(shapes, is_leaf=_is_shape)


def size(shapes: Shapes) -> int:
    """Returns the number of parameters."""
    return sum(map(math.prod, shapes_of(shapes)))


def abstract(shapes: Shapes) -> Any:
    """Returns float32 `jax.ShapeDtypeStruct`s of these shapes."""
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=_is_shape)


def normal(shapes: Shapes, scale: float) -> Any:
    """Returns float32 arrays of these shapes with normally distributed entries, the same ones at every call."""
    generator = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(np.float32(scale) * generator.standard_normal(shape, np.float32))
    return jax.tree.map(draw, shapes, is_leaf=_is_shape)

"""A small convolutional network, in flax nnx."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

WIDTHS = (16, 32, 32)
GROUPS = 4


class ConvNet(nnx.Module):
    """3×3 convolutions, each with group normalization and a ReLU, pooled in between; then a linear classifier.

    Group normalization keeps no statistics of the batch, so the parameters are all the network's state.
    """

    def __init__(self, channels: int = 1, classes: int = 10, *, rngs: nnx.Rngs):
        inputs = (channels, *WIDTHS[:-1])
        self.convolutions = nnx.List(
            nnx.Conv(n_in, n_out, (3, 3), use_bias=False, conv_general_dilated=convolve_patches, rngs=rngs)
            for n_in, n_out in zip(inputs, WIDTHS, strict=True)
        )
        self.normalizations = nnx.List(nnx.GroupNorm(width, num_groups=GROUPS, rngs=rngs) for width in WIDTHS)
        self.classifier = nnx.Linear(WIDTHS[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits, [n, classes], of images [n, height, width, channels]."""
        x = images
        for index, (convolution, normalization) in enumerate(zip(self.convolutions, self.normalizations, strict=True)):
            if index > 0:
                x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
            x = nnx.relu(normalization(convolution(x)))
        return self.classifier(x.mean(axis=(1, 2)))


def convolve_patches(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **settings: Any
) -> jax.Array:
    """Returns the convolution [n, height, width, n_out] as one product of image patches with the kernel.

    A convolution under `jax.vmap` over its kernel, here over seeds, becomes a grouped convolution, which is several
    times slower than the batched product that this becomes.

    Args:
      images: [n, height, width, n_in].
      kernel: [kernel_height, kernel_width, n_in, n_out] of odd height and width.
      strides: ones.
      padding: "SAME".
      **settings: the other arguments of `jax.lax.conv_general_dilated`, of which only the defaults are supported.
    """
    ones = all(size == 1 for key in ("lhs_dilation", "rhs_dilation") for size in settings[key])
    if padding != "SAME" or tuple(strides) != (1, 1) or not ones or settings["feature_group_count"] != 1:
        raise NotImplementedError(f"Only plain convolutions are supported, got {strides=}, {padding=}, {settings}.")
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return jnp.matmul(patches(images, *kernel.shape[:2]), matrix, precision=settings["precision"])


def patches(images: jax.Array, height: int, width: int) -> jax.Array:
    """Returns each pixel's surroundings, [n, rows, columns, height·width·channels], with zeros beyond the edges."""
    padded = jnp.pad(images, ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0)))
    shifted = [
        padded[:, row : row + images.shape[1], column : column + images.shape[2]]
        for row in range(height)
        for column in range(width)
    ]
    return jnp.concatenate(shifted, axis=-1)

"""Scikit-learn's handwritten digits, split once and for all."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

SPLIT_SEED = 0


class Split(NamedTuple):
    """Images, float32[n, height, width, channels], and their labels, int32[n]."""

    images: jax.Array
    labels: jax.Array


class ImageData(NamedTuple):
    """One split to train on, one to choose hyperparameters on, one to report."""

    train: Split
    validation: Split
    test: Split


def load(train_size: int = 300, validation_size: int = 500) -> ImageData:
    """Returns the 1797 digits of 8×8 pixels; what the first two splits leave is the test split.

    Raises:
      ValueError: if no image is left to test on.
    """
    digits = load_digits()
    images = digits.images[..., np.newaxis].astype(np.float32)
    if train_size + validation_size >= len(images):
        raise ValueError(f"train_size must be below {len(images) - validation_size}, got {train_size}.")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    parts = np.split(order, [train_size, train_size + validation_size])
    return standardize([(images[part], digits.target[part]) for part in parts])


def standardize(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> ImageData:
    """Returns training, validation and test images, each channel with the training images' mean 0 and variance 1."""
    train_images, pixels = parts[0][0], (0, 1, 2)
    mean = train_images.mean(pixels, np.float64).astype(np.float32)
    std = train_images.std(pixels, np.float64).astype(np.float32)
    return ImageData(*(Split(jnp.asarray((x - mean) / std), jnp.asarray(y, jnp.int32)) for x, y in parts))

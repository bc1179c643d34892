"""Double precision for a part of a test."""

import contextlib

import jax


def double_precision() -> contextlib.AbstractContextManager[None]:
    """Returns a context with 64-bit types, by whatever name jax has for it."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()

"""Temporary."""

import jax.numpy as jnp


def orthogonalize(m, *, steps=5, precision=None):
    t = m.shape[-2] < m.shape[-1]
    y = jnp.swapaxes(m, -1, -2) if t else m
    y = y / (jnp.max(jnp.abs(y), (-1, -2), keepdims=True) + 1e-30)
    y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-20)
    for _ in range(steps):
        a = jnp.swapaxes(y, -1, -2) @ y
        y = 3.4445 * y + y @ (-4.7750 * a + 2.0315 * a @ a)
    return jnp.swapaxes(y, -1, -2) if t else y

"""How many operations the matrix products of a traced program take on one device."""

from collections.abc import Iterator
from typing import Any

import jax

from rootfree_optax._src.transforms.flops import count_products


def product_flops(closed: Any) -> int:
    """Returns the operations of all products within `jax.shard_map`, for one device.

    Args:
      closed: what `jax.make_jaxpr` returns.
    """
    return sum(map(count_products, _shard_maps(closed)))


def _shard_maps(program: Any) -> Iterator[Any]:
    """Yields the bodies of all `jax.shard_map` in a traced program, outside of loops."""
    for equation in program.eqns:
        parts = [part for part in jax.tree.leaves(equation.params) if hasattr(part, "eqns")]
        for part in parts:
            body = getattr(part, "jaxpr", part)
            if equation.primitive.name == "shard_map":
                yield body
            else:
                yield from _shard_maps(body)

"""When to refresh the factors: callables for `update_every`."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_COUNT = np.iinfo(np.int32).max


def growing_interval(maximum: int, *, base: float = 4.0) -> Callable[[jax.Array], jax.Array]:
    """Refreshes at every step at first and ever less often, as the root-free prototype does.

        after a refresh at step k, the next is min(max(⌊log_base(k + 1)⌋, 1), maximum) steps later

    Early on the factors are far from the curvature and change fast; later each refresh has less to add.

    Args:
      maximum: the longest interval, at least one.
      base: how many times as many steps until the interval grows by one, more than one.

    Returns:
      A callable from the number of past updates, an integer scalar, to whether this update refreshes.

    Raises:
      ValueError: if `maximum` is below one or `base` is not above one.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> due = rf.growing_interval(10)
      >>> [step for step in range(26) if due(jnp.int32(step))]
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 21, 23, 25]
    """
    if maximum < 1:
        raise ValueError(f"maximum must be at least one, got {maximum}.")
    if not base > 1:
        raise ValueError(f"base must be greater than one, got {base}.")
    # The interval n is in force from its first refresh to that of n + 1: a multiple of n steps later, and the first
    # such at which ⌊log_base(k + 1)⌋ has reached n + 1.
    starts = [0]
    for interval in itertools.count(1):
        threshold = math.ceil(base ** (interval + 1)) - 1
        start = starts[-1] + interval * max(math.ceil((threshold - starts[-1]) / interval), 0)
        if interval == maximum or start > _LARGEST_COUNT:
            break
        starts.append(start)
    first_steps = np.asarray(starts, np.int32)

    def is_due(count: jax.Array) -> jax.Array:
        interval = jnp.sum(count >= first_steps).astype(count.dtype)
        return (count - jnp.asarray(first_steps, count.dtype)[interval - 1]) % interval == 0

    return is_due

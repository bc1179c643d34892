"""What changes from step to step: schedules, intervals between refreshes, the batch size of a step."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rootfree_optax._src.common.validate import (
    require_constant,
    require_fraction,
    require_interval,
    require_positive,
)

UpdateEvery = int | jax.Array | Callable[[jax.Array], jax.Array]

_MISSING_BATCH_SIZE = (
    "batch_size is required: the second-order view scales the squared gradient by the number of terms that the loss "
    "averages, and without it every other hyperparameter would depend on the batch size. Pass batch_size= when "
    "constructing the transformation (a constant batch size), or batch_size= at each update, "
    "tx.update(grads, state, params, batch_size=...)."
)

_LARGEST_COUNT = np.iinfo(np.int32).max


def value_at(hyperparameter: optax.ScalarOrSchedule, count: jax.Array) -> ArrayLike:
    """Returns a hyperparameter's value at step `count`: a schedule is called, anything else is its own value."""
    value: ArrayLike = hyperparameter(count) if callable(hyperparameter) else hyperparameter
    return value


def is_due(update_every: UpdateEvery, count: jax.Array) -> jax.Array | bool:
    """Returns whether the factors are refreshed at step `count`; True itself where that is always so.

    An int array comes from `optax.inject_hyperparams`, and so does a bool array, from a callable's value.
    """
    if isinstance(update_every, int):
        return True if update_every == 1 else count % update_every == 0
    due = update_every(count) if callable(update_every) else update_every
    due = jnp.asarray(due)
    return due if due.dtype == jnp.bool_ else count % due.astype(count.dtype) == 0


def require_static_interval(update_every: UpdateEvery) -> int:
    """Returns an interval that is a Python int.

    Raises:
      ValueError: if it is not: how many blocks are refreshed at a time is part of the program.
    """
    if not isinstance(update_every, int):
        raise ValueError(
            f"staggered=True needs update_every as a Python int, got {update_every!r}. Under "
            "optax.inject_hyperparams, name 'update_every' among its static_args."
        )
    return update_every


def resolve_batch_size(at_update: ArrayLike | None, at_construction: ArrayLike | None) -> ArrayLike:
    """Returns the batch size of this step; the one given to `update` wins.

    Raises:
      ValueError: if neither is given, or if the one given to `update` is a Python number that is not positive.
      TypeError: if that is a schedule.
    """
    if at_update is not None:
        require_constant(batch_size=at_update)
        require_positive("batch_size", at_update)
        return at_update
    if at_construction is None:
        raise ValueError(_MISSING_BATCH_SIZE)
    return at_construction


def averaging_schedule(
    preconditioner_lr: ArrayLike, update_every: ArrayLike = 1, *, maximum: ArrayLike = 0.2
) -> optax.Schedule:
    """Makes all refreshes so far weigh alike, until there are 1/β₂ of them: an average that is right from the start.

        β₂ at step k:  max(β₂, min(1 / (⌊k/T⌋ + 1), maximum))

    A moving average with a small constant β₂ stays for about T/β₂ steps near where it began, at the large gradients of
    the first steps. For `refresh="exact"`, where β₂ is the weight of the newest curvature.

    Args:
      preconditioner_lr: β₂ > 0, what the schedule falls to. A number or a traced scalar.
      update_every: T ≥ 1, the interval of the refreshes.
      maximum: of the first refreshes, unless β₂ is larger, in (0, 1): one mini-batch says something of a few directions
        alone. With T = 1 it may be 0.3; with T = 10 that has made runs come apart, unless `curvature_every` gave a
        refresh more mini-batches and a `trust_radius` bounded its steps: then it may be 0.5.

    Returns:
      A schedule for `preconditioner_lr`, from the number of past updates to β₂.

    Raises:
      ValueError: for a Python number out of range.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> schedule = rf.averaging_schedule(0.1, 10)
      >>> [f"{schedule(jnp.int32(step)):.2f}" for step in (0, 19, 49, 50, 1000)]
      ['0.20', '0.20', '0.20', '0.17', '0.10']
    """
    require_positive("preconditioner_lr", preconditioner_lr)
    require_fraction("preconditioner_lr", preconditioner_lr)
    require_positive("maximum", maximum)
    require_fraction("maximum", maximum)
    require_interval("update_every", update_every)

    def schedule(count: jax.Array) -> jax.Array:
        as_float = lambda number: jnp.asarray(number, jnp.float32)  # a traced one may be of any dtype
        of_equal_weights = 1 / as_float(count // update_every + 1)
        return jnp.maximum(as_float(preconditioner_lr), jnp.minimum(of_equal_weights, as_float(maximum)))

    return schedule


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

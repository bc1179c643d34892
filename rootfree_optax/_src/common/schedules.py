"""What changes from step to step: schedules, intervals between refreshes, the batch size of a step."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rootfree_optax._src.common import validate


@dataclasses.dataclass(frozen=True)
class Staggered:
    """Every step refreshes a T-th of the blocks, in turn; `staggered` makes it."""

    period: int


Interval = int | jax.Array | Callable[[jax.Array], jax.Array]
RefreshEvery = Interval | Staggered
StepSize = Literal["adamw", "newton"]

_MISSING_BATCH_SIZE = (
    "batch_size is required: the number of terms that the loss averages. Pass it at construction, or at each update: "
    "tx.update(grads, state, params, batch_size=...)."
)

_LARGEST_COUNT = np.iinfo(np.int32).max


def value_at(name: str, hyperparameter: optax.ScalarOrSchedule, count: jax.Array) -> ArrayLike:
    """Returns a hyperparameter's value at step `count`: a schedule is called, anything else is its own value."""
    if not callable(hyperparameter):
        return hyperparameter
    value: ArrayLike = hyperparameter(count)
    validate.require_scalar(f"what the schedule {name} returns", value)
    return value


def is_due(interval: RefreshEvery, count: jax.Array) -> jax.Array | bool | Staggered:
    """Returns whether something is done at step `count`; True itself where it is done at every step.

    An int array comes from `optax.inject_hyperparams`, and so does a bool array, from a callable's value. `Staggered`
    is returned as it is: something is done at every step, to some of the blocks.
    """
    if isinstance(interval, Staggered):
        return interval
    if isinstance(interval, numbers.Integral):
        return True if interval == 1 else count % interval == 0
    value = interval(count) if callable(interval) else interval
    if value is None or jnp.shape(value):
        raise TypeError(
            f"an interval's callable must return whether this step is one, a Boolean scalar, got {value!r}."
        )
    due = jnp.asarray(value)
    return due if due.dtype == jnp.bool_ else count % due.astype(count.dtype) == 0


def staggered(period: int) -> Staggered:
    """Refreshes a T-th of the blocks at every step, in turn, so that no step takes longer than others.

    Args:
      period: T ≥ 1, after how many steps each block has its next turn. A Python int: how many blocks are refreshed at
        once is part of the program.

    Returns:
      A value for `refresh_every`.

    Raises:
      ValueError: for anything but a whole number of at least 1.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> tx = rf.sirf_shampoo(1e-3, refresh_every=rf.staggered(10))
    """
    return Staggered(validate.whole_number("period", period))


def require_step_size(step_size: Any, absolute_damping: Any, batch_size: Any) -> None:
    """Checks how long steps are to be, and what only Newton's step takes.

    Raises:
      ValueError: for a number out of range, or for a number without effect on a step of AdamW's length.
      TypeError: for a batch size that is a schedule.
    """
    validate.require_choice("step_size", step_size, ("adamw", "newton"))
    validate.require_number("absolute_damping", absolute_damping, validate.NON_NEGATIVE)
    require_batch_size(batch_size)
    for name, value in (("batch_size", batch_size), ("absolute_damping", absolute_damping)):
        # An array may be a default of zero that `optax.inject_hyperparams` has traced.
        is_off = value is None or validate.is_zero(value) or isinstance(value, jax.Array)
        if step_size == "adamw" and not is_off:
            raise ValueError(
                f"{name} takes effect with step_size='newton' alone, got {value!r}: AdamW's length depends on "
                "neither the batch size nor the loss's scale. Leave it out, or use rf.published for the paper's form."
            )


def require_batch_size(batch_size: Any) -> None:
    """Raises a ValueError or TypeError unless B is a positive number, a traced scalar or None."""
    validate.require_number("batch_size", batch_size, validate.POSITIVE, schedule=False, optional=True)


def resolve_batch_size(at_update: ArrayLike | None, at_construction: ArrayLike | None) -> ArrayLike:
    """Returns the batch size of this step; the one given to `update` wins.

    Raises:
      ValueError: if neither is given, or if the one given to `update` is known not to be positive.
      TypeError: if that is no number.
    """
    if at_update is not None:
        require_batch_size(at_update)
        return at_update
    if at_construction is None:
        raise ValueError(_MISSING_BATCH_SIZE)
    return at_construction


def complement(decay: optax.ScalarOrSchedule, every: Interval) -> optax.ScalarOrSchedule:
    """Returns 1 − decayᶜ, the weight of the newest of values that come every c-th step, for a decay per step.

    Args:
      decay: in (0, 1), a number, a traced scalar or a schedule.
      every: c ≥ 1, a number or a traced scalar; a callable, or a Boolean that says what is due, counts as one.
    """
    power: ArrayLike = 1
    if isinstance(every, numbers.Real) and not isinstance(every, bool):
        power = int(every)
    elif not callable(every) and jnp.result_type(every) != jnp.bool_:
        power = jnp.asarray(every, jnp.float32)
    if callable(decay):
        return lambda count: 1 - value_at("statistics_decay", decay, count) ** power
    return 1 - decay**power


def growing(maximum: int, *, base: float = 4.0) -> Callable[[jax.Array], jax.Array]:
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
      >>> due = rf.growing(10)
      >>> [step for step in range(26) if due(jnp.int32(step))]
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 21, 23, 25]
    """
    maximum = validate.whole_number("maximum", maximum)
    validate.require_number(
        "base", base, validate.Range("finite and above 1", lambda x: 1 < x < math.inf), schedule=False
    )
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

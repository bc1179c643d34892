"""How fast the factors average: schedules for `preconditioner_lr`."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from rootfree_optax._src.common import hyperparameters as hyper


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
    hyper.require_positive("preconditioner_lr", preconditioner_lr)
    hyper.require_fraction("preconditioner_lr", preconditioner_lr)
    hyper.require_positive("maximum", maximum)
    hyper.require_fraction("maximum", maximum)
    hyper.require_interval("update_every", update_every)

    def schedule(count: jax.Array) -> jax.Array:
        as_float = lambda number: jnp.asarray(number, jnp.float32)  # a traced one may be of any dtype
        of_equal_weights = 1 / as_float(count // update_every + 1)
        return jnp.maximum(as_float(preconditioner_lr), jnp.minimum(of_equal_weights, as_float(maximum)))

    return schedule

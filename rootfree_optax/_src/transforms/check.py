"""Whether a state belongs to an optimizer and its parameters, asked before training goes on from a checkpoint."""

from typing import Any

import jax
import optax

from rootfree_optax._src.mesh.state_shardings import use_mesh_of
from rootfree_optax._src.transforms.checksum import checksum
from rootfree_optax._src.transforms.origin import find_origins, require_origin


def check(
    state: Any, tx: optax.GradientTransformation, params: optax.Params, saved_checksum: int | jax.Array | None = None
) -> None:
    """Raises an error if a state belongs to another optimizer or other parameters: the line after a restore.

    Every state of this package knows what it was made for: the format of its arrays, the options that decide what they
    mean, and the parameters' names, shapes, blocks and structures. Numbers that may change in training are not among
    them, such as learning rates, dampings, decays and intervals. Each `update` compares that, too. But a checkpoint
    is restored into the template of another state; then `update` sees values in a compiled program alone, where it
    cannot raise an error and returns updates of NaN.

    Args:
      state: a state of arrays, under any of Optax's wrappers.
      tx: the optimizer that is to go on from it.
      params: its parameters: arrays, or `jax.ShapeDtypeStruct`s without a checksum.
      saved_checksum: of (params, state) when they were saved, see `rf.checksum`. None compares none.

    Returns:
      Nothing.

    Raises:
      ValueError: naming the options and parameters that differ; or for another checksum than the saved one.

    Example:
      >>> import jax.numpy as jnp, rootfree_optax as rf
      >>> params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
      >>> tx = rf.sirf_muon(1e-3)
      >>> rf.check(tx.init(params), rf.sirf_muon(3e-4, damping=0.2), params)
      >>> rf.check(tx.init(params), rf.sirf_muon(1e-3, power=0.5), params)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: ...power was 0.25 and is 0.5. Go back to those, carry over ...
    """
    expected: list[str] = []  # read while it is traced, as a class of the user's may refuse to hold shapes
    with use_mesh_of(params):
        jax.eval_shape(
            lambda params: expected.extend([origin.text for origin in find_origins(tx.init(params))]), params
        )
    found = list(find_origins(state))
    if len(found) != len(expected):
        raise ValueError(
            f"the state must be one of this optimizer, with {len(expected)} states of this package's transformations, "
            f"got {len(found)}. Restore it into tx.init(params)."
        )
    for origin, text in zip(found, expected, strict=True):
        require_origin(origin, text)
    if saved_checksum is not None and int(saved_checksum) != (now := int(checksum((params, state)))):
        raise ValueError(
            f"params and state must have the checksum that they were saved with, {int(saved_checksum)}, got {now}: the "
            "checkpoint is damaged. Restore another one."
        )

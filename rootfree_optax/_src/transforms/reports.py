"""How Kronecker transformations tell `describe` what they are: `init` reports itself to whoever listens."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from rootfree_optax._src.blocks.rule import BlockRule
from rootfree_optax._src.common.schedules import Interval, RefreshEvery
from rootfree_optax._src.layout import Plan


class KroneckerReport(NamedTuple):
    """What one Kronecker transformation does with the parameters that it was given.

    Attributes:
      plan: how they become blocks.
      rule: what is done with a block.
      refresh_every: when preconditioners are refreshed.
      statistics_every: when statistics take in a gradient; None for never.
      axes: the mesh axes that the blocks are divided over.
      received_bytes: what a device receives of others in an update; None where the compiler decides.
      state: the transformation's state, of `jax.ShapeDtypeStruct`s.
    """

    plan: Plan
    rule: BlockRule
    refresh_every: RefreshEvery
    statistics_every: Interval | None
    axes: tuple[str, ...]
    received_bytes: int | None
    state: Any


_reports: contextvars.ContextVar[list[KroneckerReport] | None] = contextvars.ContextVar("reports", default=None)


@contextlib.contextmanager
def collect_reports() -> Iterator[list[KroneckerReport]]:
    """Yields a list to which every `init` of a Kronecker transformation within the context adds its report."""
    reports: list[KroneckerReport] = []
    token = _reports.set(reports)
    try:
        yield reports
    finally:
        _reports.reset(token)


def report(new: KroneckerReport) -> None:
    """Adds a report to the list of `collect_reports`, if there is one; of the state, only shapes and dtypes."""
    if (reports := _reports.get()) is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), new.state)
        reports.append(new._replace(state=shapes))

"""The library's methods as users build them, and variants of them, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

import rootfree_optax as rf

PERIOD = 10
_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with factors.

    Attributes:
      build: makes the optimizer, of a learning rate.
      layout: how parameters become blocks.
      options: other arguments than the library's defaults.
    """

    build: Callable[..., optax.GradientTransformationExtraArgs]
    layout: rf.Layout
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def period(self) -> int | None:
        """Steps from one refresh of all blocks to the next; None where steps refresh different blocks."""
        refresh_every = self.options.get("refresh_every", PERIOD)
        return refresh_every if isinstance(refresh_every, int) else None

    def make(self) -> optax.GradientTransformationExtraArgs:
        """Returns the optimizer."""
        return self.build(1e-3, layout=self.layout, **self.options)


def kronecker_methods(block_size: int) -> dict[str, Method]:
    """Returns the methods with factors, refreshed at every tenth step unless the name says otherwise.

    Args:
      block_size: the maximal length of a block, where the name does not say whole axes.
    """
    blocks = rf.Layout(block_size=block_size)
    half = dataclasses.replace(blocks, factor_dtype="bfloat16")
    # The paper's has factors for every parameter.
    whole = rf.Layout(diagonal=None, block_size=None, merge_dims=None)
    everywhere = dataclasses.replace(blocks, diagonal=None)
    every_step, every_tenth = {"refresh_every": 1}, {"refresh_every": PERIOD}
    published = lambda layout, **options: Method(
        rf.published.sirf_shampoo, layout, {"batch_size": _BATCH_SIZE, **options}
    )
    return {
        "sirf_muon": Method(rf.sirf_muon, blocks),
        "sirf_muon, T=1": Method(rf.sirf_muon, blocks, every_step),
        "sirf_muon, staggered": Method(rf.sirf_muon, blocks, {"refresh_every": rf.staggered(PERIOD)}),
        "sirf_muon, bf16": Method(rf.sirf_muon, half),
        "sirf_shampoo": Method(rf.sirf_shampoo, blocks),
        "sirf_shampoo, T=1": Method(rf.sirf_shampoo, blocks, every_step),
        "kl_shampoo": Method(rf.kl_shampoo, blocks),
        "kl_shampoo, T=1": Method(rf.kl_shampoo, blocks, every_step),
        "published.sirf_shampoo, whole axes, T=1": published(whole, **every_step),
        "published.sirf_shampoo, whole axes": published(whole, **every_tenth),
        "published.sirf_shampoo": published(everywhere, **every_tenth),
        "published.sirf_shampoo, cached": published(everywhere, **every_tenth, cache_preconditioner=True),
    }


def other_methods() -> dict[str, optax.GradientTransformationExtraArgs]:
    """Returns the methods without factors."""
    return {
        "rf_adamw": rf.rf_adamw(1e-3),
        "rf_rmsprop": rf.rf_rmsprop(1e-3),
        "published.rf_adamw": rf.published.rf_adamw(1e-3, batch_size=_BATCH_SIZE),
    }

"""The settings of this library's methods that the suite runs, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

import rootfree_optax as rf

PERIOD = 10
_PUBLISHED = {"preconditioner_lr": 1e-2, "damping": 1e-3, "momentum": 0.9, "batch_size": 32}


@dataclasses.dataclass(frozen=True)
class Method:
    """A setting of one of the Kronecker methods.

    Attributes:
      build: makes the optimizer, of a learning rate.
      layout: how parameters become blocks.
      options: other arguments.
    """

    build: Callable[..., optax.GradientTransformation]
    layout: rf.Layout
    options: dict[str, Any]

    @property
    def is_published(self) -> bool:
        """Whether it is the paper's SIRF-Shampoo, whose products the floors count."""
        return self.build is rf.published.sirf_shampoo

    @property
    def is_cached(self) -> bool:
        """Whether K Kᵀ is kept."""
        return self.options.get("cache_preconditioner", False)

    def make(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        return self.build(1e-3, layout=self.layout, **self.options)


def published(layout: rf.Layout, **options: Any) -> Method:
    """Returns the paper's SIRF-Shampoo, refreshed at every tenth step."""
    return Method(rf.published.sirf_shampoo, layout, {"refresh_every": PERIOD, **_PUBLISHED, **options})


def kronecker_methods(block_size: int) -> dict[str, Method]:
    """Returns the Kronecker methods: the defaults, refreshed at every tenth step, and variants of them."""
    blocks, half = rf.Layout(block_size=block_size), rf.Layout(block_size=block_size, factor_dtype="bfloat16")
    # As the official code: factors for all parameters.
    whole = rf.Layout(diagonal=None, block_size=None, merge_dims=None)
    all_blocks = dataclasses.replace(whole, block_size=block_size)
    all_half = dataclasses.replace(all_blocks, factor_dtype="bfloat16")
    every_step = {"refresh_every": 1}
    return {
        "sirf_shampoo": Method(rf.sirf_shampoo, blocks, {}),
        "sirf_shampoo, T=1": Method(rf.sirf_shampoo, blocks, every_step),
        "sirf_shampoo, staggered": Method(rf.sirf_shampoo, blocks, {"refresh_every": rf.staggered(PERIOD)}),
        "sirf_shampoo, bf16": Method(rf.sirf_shampoo, half, {}),
        "kl_shampoo": Method(rf.kl_shampoo, blocks, {}),
        "kl_shampoo, T=1": Method(rf.kl_shampoo, blocks, every_step),
        "sirf_muon": Method(rf.sirf_muon, blocks, {}),
        "sirf_muon, T=1": Method(rf.sirf_muon, blocks, every_step),
        "published, whole axes": published(whole),
        "published, whole axes *": published(whole, cache_preconditioner=True),
        "published": published(all_blocks),
        "published *": published(all_blocks, cache_preconditioner=True),
        "published *, bf16": published(all_half, cache_preconditioner=True),
    }


def other_methods(block_size: int) -> dict[str, optax.GradientTransformation]:
    """Returns this library's other methods."""
    layout = rf.Layout(diagonal=None, block_size=block_size, merge_dims=None)
    return {
        "published rf_shampoo": rf.published.rf_shampoo(1e-3, layout=layout, refresh_every=PERIOD, **_PUBLISHED),
        "rf_rmsprop": rf.rf_rmsprop(1e-3, momentum=None),
        "rf_adamw": rf.rf_adamw(1e-3),
    }

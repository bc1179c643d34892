"""The settings of this library's methods that the suite runs, by name."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from harness import published

import rootfree_optax as rf

PERIOD = 10
_COMMON = {"preconditioner_lr": 1e-2, "damping": 1e-3, "momentum": 0.9, "batch_size": 32}
_EXACT = {
    "refresh": "exact",
    "riemannian_momentum": None,
    "initial_scale": "first_gradient",
    "momentum_of": "gradients",
    "nesterov": True,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A setting of `rf.sirf_shampoo`.

    Attributes:
      layout: how parameters become blocks.
      options: other arguments.
    """

    layout: rf.Layout
    options: dict[str, Any]

    @property
    def dtype(self) -> Any:
        """Of the factors."""
        return self.options.get("preconditioner_dtype", jnp.float32)

    @property
    def cached(self) -> bool:
        """Whether K Kᵀ is kept."""
        return self.options.get("cache_products", False)

    @property
    def period(self) -> int:
        """Steps from one refresh to the next."""
        return self.options["update_every"]

    def make(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        return rf.sirf_shampoo(1e-3, layout=self.layout, **{**published.OPTIMIZER, **_COMMON, **self.options})


def _sirf(block_size: int | None, period: int = PERIOD, **options: Any) -> Method:
    return Method(rf.Layout(block_size=block_size), {"update_every": period, **options})


def sirf_methods(block_size: int) -> dict[str, Method]:
    """Returns the settings of inverse-free Shampoo."""
    half = jnp.dtype("bfloat16")
    return {
        "sirf, whole axes": _sirf(None),
        "sirf, whole axes *": _sirf(None, cache_products=True),
        "sirf, T=1": _sirf(block_size, 1),
        "sirf, T=2": _sirf(block_size, 2),
        "sirf": _sirf(block_size),
        "sirf *": _sirf(block_size, cache_products=True),
        "sirf *, staggered": _sirf(block_size, cache_products=True, staggered=True),
        "sirf, bf16": _sirf(block_size, preconditioner_dtype=half),
        "sirf *, bf16": _sirf(block_size, cache_products=True, preconditioner_dtype=half),
        "sirf *, exact": _sirf(block_size, cache_products=True, **_EXACT),
        "sirf *, exact, bf16": _sirf(block_size, cache_products=True, preconditioner_dtype=half, **_EXACT),
        "sirf *, observing": _sirf(block_size, cache_products=True, curvature_every=2, trust_radius=3.0, **_EXACT),
    }


def other_methods(block_size: int) -> dict[str, optax.GradientTransformation]:
    """Returns this library's other methods."""
    layout = rf.Layout(block_size=block_size)
    return {
        "rf_shampoo": rf.rf_shampoo(1e-3, layout=layout, update_every=PERIOD, **_COMMON),
        "rf_rmsprop": rf.rf_rmsprop(1e-3, momentum=None, batch_size=32),
        "rf_adamw": rf.rf_adamw(1e-3, batch_size=32),
    }

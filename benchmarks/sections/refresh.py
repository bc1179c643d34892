"""What the exact refresh costs beside the published one: the refresh alone, and the mean step with its interval."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import report, turns

import rootfree_optax as rf
from rootfree_optax._src.blocks.factor_step import exact_factor, published_factor
from rootfree_optax._src.blocks.factor_update import refresh
from rootfree_optax._src.mesh import stacks_on_mesh as sharded_plan
from rootfree_optax._src.stacks import refresh as refreshing

STACKS = ((16, 256), (1, 1024))
DTYPES = ("float32", "bfloat16")
# Each refresh with its interval, and with how many gradients of an interval are observed besides that of the refresh.
INTERVALS = {"published": (2, 0), "exact": (10, 0), "observing": (10, 4)}

TITLE = "A refresh of stacks of dense factors, {repeats} rounds"
CAPTION = (
    "Milliseconds of the fastest calls, all taking turns within one run. A refresh of both factors of n blocks, "
    "published, with Riemannian momentum, and exact; their ratio, by fastest calls and by medians. step: mean of a "
    "step's refresh and application, K Kᵀ cached, published at every 2nd step; exact at every 10th over that, and the "
    "same observing: with the curvature of every 2nd gradient, and a trust radius."
)
COLUMNS = (
    report.Column("blocks", "n", ".0f"),
    report.Column("dim", "d", ".0f"),
    report.Column("dtype", "dtype"),
    report.Column("published_seconds", "publ.\n", ".1f", 1e3),
    report.Column("exact_seconds", "exact\n", ".1f", 1e3),
    report.Column("ratio", "ratio\n", ".2f"),
    report.Column("median_ratio", "med.\n", ".2f"),
    report.Column("published_mean_seconds", "step,\npubl.", ".1f", 1e3),
    report.Column("mean_ratio", "ratio,\nexact", ".2f"),
    report.Column("observing_ratio", "ratio,\nobs.", ".2f"),
)


def measure(blocks: int, dim: int, dtype: str, repeats: int, *, watch: Any = iter) -> dict[str, Any]:
    """Returns the times of one stack of square blocks."""
    gradient = jnp.asarray(np.random.default_rng(0).standard_normal((blocks, dim, dim)), jnp.float32)
    refreshes = {
        "published": _refresh(gradient, dtype, published_factor, momentum=True),
        "without_momentum": _refresh(gradient, dtype, published_factor),
        "exact": _refresh(gradient, dtype, exact_factor),
    }
    kinds = {"refresh": (True, True), "plain": (False, False), "observe": (False, True)}
    steps = {
        f"{name}_{kind}": _step(gradient, dtype, name, *due)
        for name, (_, others) in INTERVALS.items()
        for kind, due in kinds.items()
        if kind != "observe" or others
    }
    runs = {name: turns.timed(run, carry) for name, (run, carry) in (refreshes | steps).items()}
    times = {name: turns.spread(seconds) for name, seconds in turns.take_turns(runs, repeats, 1, watch).items()}
    fastest = lambda name, kind: times[f"{name}_{kind}"].fastest
    means = {
        f"{name}_mean_seconds": (
            fastest(name, "refresh")
            + (others * fastest(name, "observe") if others else 0)
            + (period - 1 - others) * fastest(name, "plain")
        )
        / period
        for name, (period, others) in INTERVALS.items()
    }
    return {
        "blocks": blocks,
        "dim": dim,
        "dtype": dtype,
        **{f"{name}_seconds": times[name].fastest for name in runs},
        **{f"{name}_median_seconds": times[name].median for name in runs},
        "ratio": times["exact"].fastest / times["published"].fastest,
        "median_ratio": times["exact"].median / times["published"].median,
        **means,
        "mean_ratio": means["exact_mean_seconds"] / means["published_mean_seconds"],
        "observing_ratio": means["observing_mean_seconds"] / means["published_mean_seconds"],
    }


def _refresh(
    gradient: jax.Array, dtype: str, refresh_factor: Callable[..., Any], *, momentum: bool = False
) -> tuple[Callable[[Any], Any], Any]:
    """Returns the refresh of a stack as a step, and its first carry."""
    blocks, dim, _ = gradient.shape
    plan = sharded_plan.for_parameters(rf.Layout("dense", layer_axes=0).plan(gradient), None, gradient)
    refresh_block = functools.partial(
        refresh,
        preconditioner_lr=0.1,
        damping=1e-4,
        riemannian_momentum=0.5,
        batch_size=1.0,
        count=jnp.zeros([], jnp.int32),
        refresh_factor=refresh_factor,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any) -> Any:  # with the gradient, a constant otherwise, which the compiler would fold
        gradient, *state = carry
        beside = ((), (), ())  # neither products nor what has started or was observed
        factors, momenta, *_ = refreshing.refresh_when(True, plan, refresh_block, (gradient,), (*state, *beside))
        return gradient, factors, momenta

    make = lambda: jnp.tile(jnp.eye(dim, dtype=dtype), (blocks, 1, 1))
    factors = (((make(),), (make(),)),)
    return step, (jnp.copy(gradient), factors, jax.tree.map(jnp.zeros_like, factors) if momentum else ())


def _step(
    gradient: jax.Array, dtype: str, name: str, refreshes: bool, observes: bool
) -> tuple[Callable[[Any], Any], Any]:
    """Returns a step of the transformation, with what is due at it, and its first carry."""
    always_or_never = lambda due: (lambda count: count >= 0) if due else (lambda count: count < 0)
    observing = {"curvature_every": always_or_never(observes), "trust_radius": 3.0} if name == "observing" else {}
    tx = rf.scale_by_sirf_shampoo(
        0.1,
        riemannian_momentum=0.5 if name == "published" else None,
        initial_scale=1.0,
        batch_size=1,
        update_every=always_or_never(refreshes),
        layout=rf.Layout(layer_axes=0),
        preconditioner_dtype=dtype,
        refresh="published" if name == "published" else "exact",
        cache_products=True,
        **observing,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any) -> Any:
        gradient, _, state = carry
        return gradient, *tx.update(gradient, state)

    return step, (jnp.copy(gradient), jnp.zeros_like(gradient), tx.init(gradient))

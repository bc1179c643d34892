"""What the exact refresh costs beside the published one: the refresh alone, and the mean step with its interval."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import report, timing

import rootfree_optax as rf
from rootfree_optax.factor_step import exact_factor, published_factor
from rootfree_optax.factor_update import refresh
from rootfree_optax.structures import dense

STACKS = ((16, 256), (1, 1024))
DTYPES = ("float32", "bfloat16")
# Each refresh with its interval.
INTERVALS = {"published": 2, "exact": 10}

TITLE = "A refresh of stacks of dense factors, {repeats} rounds"
CAPTION = (
    "Milliseconds of the fastest calls, all taking turns within one run. A refresh of both factors of n blocks, "
    "published, with Riemannian momentum, and exact; exact over published, by fastest calls and by medians. step: mean "
    "of a step's refresh and application, published every 2nd step, exact every 10th, K Kᵀ cached."
)
COLUMNS = (
    report.Column("blocks", "n", ".0f"),
    report.Column("dim", "d", ".0f"),
    report.Column("dtype", "dtype"),
    report.Column("published_seconds", "pub-\nlished", ".1f", 1e3),
    report.Column("exact_seconds", "exact\n", ".1f", 1e3),
    report.Column("ratio", "ratio\n", ".2f"),
    report.Column("median_ratio", "me-\ndians", ".2f"),
    report.Column("published_mean_seconds", "step,\npubl.", ".1f", 1e3),
    report.Column("exact_mean_seconds", "step,\nexact", ".1f", 1e3),
    report.Column("mean_ratio", "ratio\n", ".2f"),
)


def measure(blocks: int, dim: int, dtype: str, repeats: int, *, watch: Any = iter) -> dict[str, Any]:
    """Returns the times of one stack of square blocks."""
    gradient = jnp.asarray(np.random.default_rng(0).standard_normal((blocks, dim, dim)), jnp.float32)
    refreshes = {
        "published": _refresh(gradient, dtype, published_factor, momentum=True),
        "without_momentum": _refresh(gradient, dtype, published_factor),
        "exact": _refresh(gradient, dtype, exact_factor),
    }
    every = {"refresh": lambda count: count >= 0, "plain": lambda count: count < 0}
    steps = {f"{name}_{kind}": _step(gradient, dtype, name, due) for name in INTERVALS for kind, due in every.items()}
    runs = refreshes | steps
    carries = {name: carry for name, (_, carry) in runs.items()}
    times = timing.alternate({name: run for name, (run, _) in runs.items()}, carries, repeats=repeats, watch=watch)
    means = {
        f"{name}_mean_seconds": (times[f"{name}_refresh"].fastest + (period - 1) * times[f"{name}_plain"].fastest)
        / period
        for name, period in INTERVALS.items()
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
    }


def _refresh(
    gradient: jax.Array, dtype: str, refresh_factor: Callable[..., Any], *, momentum: bool = False
) -> tuple[Callable[[Any], Any], Any]:
    """Returns the refresh of a stack as a step, and its first carry."""
    blocks, dim, _ = gradient.shape
    refresh_block = functools.partial(
        refresh,
        structures=(dense(dim), dense(dim)),
        preconditioner_lr=0.1,
        damping=1e-4,
        riemannian_momentum=0.5,
        batch_size=1.0,
        count=jnp.zeros([], jnp.int32),
        refresh_factor=refresh_factor,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any) -> Any:  # with the gradient, a constant otherwise, which the compiler would fold
        factors, momenta, _ = jax.vmap(refresh_block)(*carry)
        return carry[0], factors, momenta

    make = lambda: jnp.tile(jnp.eye(dim, dtype=dtype), (blocks, 1, 1))
    factors = ((make(),), (make(),))
    return step, (jnp.copy(gradient), factors, jax.tree.map(jnp.zeros_like, factors) if momentum else ())


def _step(
    gradient: jax.Array, dtype: str, name: str, due: Callable[[jax.Array], jax.Array]
) -> tuple[Callable[[Any], Any], Any]:
    """Returns a step of the transformation, with the refresh or without, and its first carry."""
    tx = rf.scale_by_sirf_shampoo(
        0.1,
        riemannian_momentum=None if name == "exact" else 0.5,
        initial_scale=1.0,
        batch_size=1,
        update_every=due,
        layout=rf.Layout(stacked=1),
        preconditioner_dtype=dtype,
        refresh=name,
        cache_products=True,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any) -> Any:
        gradient, _, state = carry
        return gradient, *tx.update(gradient, state)

    return step, (jnp.copy(gradient), jnp.zeros_like(gradient), tx.init(gradient))

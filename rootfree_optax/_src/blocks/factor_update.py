"""The mathematics of inverse-free root-free Shampoo, for ONE block: no trees, no flags, no schedules.

A block is a tensor G with axes 1…N of lengths d₁…d_N. Each axis has a factor K of some structure, with
K Kᵀ ≈ S⁻¹, where S is RF-Shampoo's curvature estimate along that axis, and a momentum m of the same structure.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rootfree_optax._src.blocks.factor_step import factor_steps, outer_products, published_factor, times_scalar
from rootfree_optax._src.numerics.dtypes import upcast
from rootfree_optax._src.numerics.finite import all_finite, max_abs
from rootfree_optax._src.numerics.rounding import exponent_of, power_of_two, round_dithered, saturate, within_range
from rootfree_optax._src.structures.base import Parts, Structure

Observed = tuple[tuple[Parts, ...], jax.Array]


def balance(factors: tuple[Parts, ...], sizes: Sequence[jax.Array]) -> tuple[Parts, ...]:
    """Returns the factors brought within 2¹⁶ of each other, by exact powers of two whose product is one.

    c·K₁ and K₂ / c precondition alike and have equal steps, so nothing in the refresh holds c: in tens of thousands of
    refreshes it would drift until one factor overflows.

    Args:
      factors: the parts of each.
      sizes: the largest absolute value of each, see `max_abs`.
    """
    exponents = [exponent_of(size) for size in sizes]
    shifts = [jnp.sign(e - exponents[0]) * (jnp.abs(e - exponents[0]) // 16) * 8 for e in exponents]
    return tuple(
        times_scalar(parts, power_of_two(shift))
        for parts, shift in zip(
            factors, [sum(shifts[1:], start=shifts[0]), *(-shift for shift in shifts[1:])], strict=True
        )
    )


def observe(
    gradient: jax.Array,
    factors: tuple[Parts, ...],
    observed: Observed,
    *,
    structures: Sequence[Structure],
    batch_size: ArrayLike,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Observed]:
    """Adds a gradient's outer products to those since the last refresh; one that is not finite counts for nothing.

    Args:
      gradient: G, [d₁, …, d_N] or [samples, d₁, …, d_N].
      factors: the parts of each Kₙ.
      observed: the parts of the sum of each axis's outer products, and of how many gradients it is.
      structures: the structure of each factor.
      batch_size: B > 0.
      precision: of every product.

    Returns:
      The new sums, of the dtypes of the old, and number.
    """
    sums, number = observed
    outers = outer_products(gradient, structures, factors, batch_size=batch_size, precision=precision)
    keep = all_finite([max_abs(parts) for parts in outers])
    # To nearest, a long sum would stop growing in half precision.
    rounded = lambda total, dtype: round_dithered(within_range(total, dtype), dtype, number)
    add = lambda total, outer: jnp.where(keep, rounded(upcast(total) + outer, total.dtype), total)
    return ((jax.tree.map(add, sums, outers), number + keep.astype(number.dtype)),)


def refresh(
    gradient: jax.Array,
    factors: tuple[Parts, ...],
    momenta: tuple[Parts, ...],
    products: tuple[Parts, ...] = (),
    started: jax.Array | tuple[()] = (),
    observed: Observed | tuple[()] = (),
    *,
    structures: Sequence[Structure],
    preconditioner_lr: ArrayLike,
    damping: ArrayLike,
    riemannian_momentum: ArrayLike,
    batch_size: ArrayLike,
    count: jax.Array,
    refresh_factor: Callable[..., Parts] = published_factor,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[tuple[Parts, ...], tuple[Parts, ...], tuple[Parts, ...], jax.Array | tuple[()], Observed | tuple[()]]:
    """Refreshes a block's factors and their momenta; a block that would come out non-finite stays as it was.

        mₙ ← α₂ mₙ + (1 − α₂) stepₙ        Kₙ ← refresh_factor(Kₙ, mₙ)

    Args:
      gradient: G, [d₁, …, d_N] or [samples, d₁, …, d_N].
      factors: the parts of each Kₙ.
      momenta: the parts of each mₙ, or empty: then mₙ = stepₙ and none is kept.
      products: the parts of each KₙKₙᵀ, or empty: then none is kept.
      started: whether the block has seen a gradient, a scalar, without which it stays as it was: refreshed with none,
        its factors would grow until they know of the damping alone. Or empty.
      observed: what `observe` has added up, whose mean takes the place of G's outer products; or empty. A block that
        has observed nothing stays as it was.
      structures: the structure of each factor.
      preconditioner_lr: β₂ ≥ 0.
      damping: λ ≥ 0.
      riemannian_momentum: α₂, in [0, 1).
      batch_size: B > 0.
      count: the step's number.
      refresh_factor: how a factor takes its step, `published_factor` or `exact_factor`.
      precision: of every product.

    Returns:
      The new factors, momenta and products, of the dtypes of the old, whether the block has started, as before, and
      zeros in place of what was observed.
    """
    if observed:
        sums, number = observed
        outers = jax.tree.map(lambda total: upcast(total) / jnp.maximum(number, 1).astype(upcast(total).dtype), sums)
    else:
        outers = outer_products(gradient, structures, factors, batch_size=batch_size, precision=precision)
    directions = factor_steps(outers, structures, factors, damping=damping, precision=precision)
    if momenta:
        directions = jax.tree.map(
            lambda m, step: (
                jnp.asarray(riemannian_momentum, step.dtype) * m.astype(step.dtype)
                + jnp.asarray(1 - riemannian_momentum, step.dtype) * step
            ),
            momenta,
            directions,
        )
    refreshed = tuple(
        refresh_factor(s, k, m, preconditioner_lr=preconditioner_lr, count=count, precision=precision)
        for s, k, m in zip(structures, factors, directions, strict=True)
    )
    stored = lambda new, old: saturate(new, old.dtype)
    new_momenta = jax.tree.map(stored, directions, momenta) if momenta else ()
    # Each pass over the factors counts beside their products. These say what one over every entry would, and of the
    # momenta, too: one that is not finite makes its factor so.
    sizes = [max_abs(parts) for parts in refreshed]
    conditions = [all_finite(sizes), *(number > 0 for number in observed[1:]), *jax.tree.leaves(started)]
    keep = functools.reduce(jnp.logical_and, conditions)
    select = functools.partial(jax.tree.map, lambda new, old: jnp.where(keep, new, old))
    new_factors = select(balance(refreshed, sizes), factors)
    squares = tuple(s.square(k, precision=precision) for s, k in zip(structures, new_factors, strict=True) if products)
    new_products = jax.tree.map(stored, squares, products)
    nothing = jax.tree.map(jnp.zeros_like, observed)
    return new_factors, select(new_momenta, momenta), new_products, started, nothing

"""The averaging schedule, by the weights that it gives to each refresh, and in the exact refresh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rootfree_optax as rf
from rootfree_optax._src.blocks.sirf import ExactRefresh
from rootfree_optax._src.common.schedules import average_equally


@pytest.mark.parametrize(("interval", "lr"), [(1, 0.05), (10, 0.02), (3, 0.25)])
def test_refreshes_weigh_alike_until_there_are_enough(interval, lr):
    """But the first three, which at a maximum of 0.3 have to share their weight with the start."""
    n = round(1 / lr)
    counts = interval * jnp.arange(3 * n, dtype=jnp.int32)
    rates = np.asarray(jax.vmap(average_equally(lr, interval, largest=0.3))(counts), np.float64)
    assert rates[0] == pytest.approx(0.3)
    np.testing.assert_allclose(rates[n:], lr, rtol=1e-6)
    remaining = lambda first: np.prod(1 - rates[first:n])
    weights = [rates[j] * remaining(j + 1) for j in range(3, n)]
    np.testing.assert_allclose(weights, 1 / n, rtol=1e-5)


def test_holds_through_an_interval():
    schedule = average_equally(0.01, 4, largest=0.5)
    values = [float(schedule(jnp.int32(count))) for count in range(12)]
    np.testing.assert_allclose(values, np.repeat([0.5, 0.5, 1 / 3], 4), rtol=1e-6)


def test_traced_numbers_of_any_dtype():
    rate = jax.jit(lambda lr: average_equally(lr, 1, largest=0.25)(jnp.int32(0)))
    assert rate(jnp.bfloat16(0.125)) == 0.25


def test_the_exact_refresh_of_a_vector_is_the_average():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(20, 4)).astype(np.float32)

    @jax.jit
    def last_direction(lr):
        weight = average_equally(lr, 2, largest=0.3)
        tx = rf.scale_by_kronecker(ExactRefresh(), weight=weight, damping=0.1, batch_size=3, refresh_every=2)
        state = tx.init(jnp.zeros(4))
        step = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(step, state, jnp.asarray(gradients))[1][-1]

    s = np.full(4, 3 * np.mean(np.float64(gradients[0]) ** 2) + 0.1)
    for k, g in enumerate(gradients[::2].astype(np.float64)):
        rate = max(0.15, min(0.3, 1 / (k + 1)))
        s = (1 - rate) * s + rate * (3 * g**2 + 0.1)
    np.testing.assert_allclose(last_direction(jnp.float32(0.15)), gradients[-1] / s, rtol=1e-4)


def test_a_schedule_and_intervals_that_are_not_numbers() -> None:
    """The weight falls to the schedule's value of the step; a callable interval counts as one step."""
    falling = lambda count: 0.5 / (1 + count.astype(jnp.float32))
    counts = jnp.arange(6, dtype=jnp.int32)
    weights = jax.vmap(average_equally(falling, rf.growing(3), largest=0.2))(counts)
    np.testing.assert_allclose(weights, [0.5, 0.25, 0.2, 0.2, 0.2, 1 / 6], rtol=1e-6)
    in_turn = jax.vmap(average_equally(0.01, rf.staggered(2), largest=0.5))(counts)
    np.testing.assert_allclose(in_turn, [0.5, 0.5, 0.5, 0.5, 1 / 3, 1 / 3], rtol=1e-6)

"""The averaging schedule, by the weights that it gives to each refresh, and in the exact refresh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rootfree_optax as rf


@pytest.mark.parametrize(("interval", "lr"), [(1, 0.05), (10, 0.02), (3, 0.25)])
def test_refreshes_weigh_alike_until_there_are_enough(interval, lr):
    """But the first three, which at a maximum of 0.3 have to share their weight with the start."""
    n = round(1 / lr)
    counts = interval * jnp.arange(3 * n, dtype=jnp.int32)
    rates = np.asarray(jax.vmap(rf.averaging_schedule(lr, interval, maximum=0.3))(counts), np.float64)
    assert rates[0] == pytest.approx(0.3)
    np.testing.assert_allclose(rates[n:], lr, rtol=1e-6)
    remaining = lambda first: np.prod(1 - rates[first:n])
    weights = [rates[j] * remaining(j + 1) for j in range(3, n)]
    np.testing.assert_allclose(weights, 1 / n, rtol=1e-5)


def test_holds_through_an_interval():
    schedule = rf.averaging_schedule(0.01, 4, maximum=0.5)
    values = [float(schedule(jnp.int32(count))) for count in range(12)]
    np.testing.assert_allclose(values, np.repeat([0.5, 0.5, 1 / 3], 4), rtol=1e-6)


def test_traced_numbers_of_any_dtype():
    rate = jax.jit(lambda lr, maximum: rf.averaging_schedule(lr, maximum=maximum)(jnp.int32(0)))
    assert rate(jnp.bfloat16(0.125), jnp.float16(0.25)) == 0.25


def test_the_exact_refresh_of_a_vector_is_the_average():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(20, 4)).astype(np.float32)
    options = {"refresh": "exact", "initial_scale": 2.0, "update_every": 2, "batch_size": 3}

    @jax.jit
    def last_direction(lr):
        tx = rf.scale_by_sirf_shampoo(rf.averaging_schedule(lr, 2, maximum=0.3), 0.1, None, **options)
        state = tx.init(jnp.zeros(4))
        step = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(step, state, jnp.asarray(gradients))[1][-1]

    s = np.full(4, 2.0)
    for k, g in enumerate(gradients[::2].astype(np.float64)):
        rate = max(0.15, min(0.3, 1 / (k + 1)))
        s = (1 - rate) * s + rate * (3 * g**2 + 0.1)
    np.testing.assert_allclose(last_direction(jnp.float32(0.15)), gradients[-1] / s, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preconditioner_lr": 0.0}, r"preconditioner_lr must be positive, got 0.0"),
        ({"preconditioner_lr": 1.0}, r"preconditioner_lr must lie in \[0, 1\), got 1.0"),
        ({"preconditioner_lr": 0.1, "maximum": 1.0}, r"maximum must lie in \[0, 1\), got 1.0"),
        ({"preconditioner_lr": 0.1, "update_every": 0}, r"update_every must be a whole number of at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        rf.averaging_schedule(**arguments)

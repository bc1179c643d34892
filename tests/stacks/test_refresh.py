"""When statistics take in a gradient and blocks are refreshed: all at once, a portion at a time, or in turn.

By a rule that only records, so that every number says which gradient of which block came when.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import refuses
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kronecker_runs import draw, run
from layouts import whole

import rootfree_optax as rf
from rootfree_optax._src.stacks import step as step_module


class Record(NamedTuple):
    """What a block has recorded: the sum of gradients since the last refresh, and what the last refresh found."""

    since: jax.Array
    found: jax.Array
    sample: jax.Array
    refreshes: jax.Array


@dataclasses.dataclass(frozen=True)
class Recorder(rf.BlockRule):
    """A rule whose statistics are sums of gradients."""

    def init(self, structures, dtypes):
        zeros = jnp.zeros([s.dim for s in structures])
        return Record(zeros, zeros, zeros, jnp.zeros([], jnp.int32))

    def observe(self, state, gradient, *, structures, step):
        return state._replace(since=state.since + gradient)

    def refresh(self, state, gradient, *, structures, step):
        return Record(jnp.zeros_like(state.since), state.since, gradient, state.refreshes + 1)

    def precondition(self, state, momentum, *, gradient, structures, step):
        return momentum, state


def record(**options):
    return rf.scale_by_kronecker(Recorder(), **options)


def steps_with_refresh(refreshes):
    """Returns at which steps there is one more refresh than before, from how many there have been by each."""
    return np.flatnonzero(np.diff(refreshes, axis=0, prepend=0)).tolist()


def is_third(count):
    return count % 3 == 0


@pytest.mark.parametrize(
    ("how", "refresh_every"),
    [("given", 3), ("given", is_third), ("given", jnp.int32(3)), ("injected", 3), ("injected", is_third)],
)
def test_refreshes_come_every_third_step_however_that_is_said(how, refresh_every):
    make = lambda refresh_every: record(refresh_every=refresh_every)
    constructor = optax.inject_hyperparams(make) if how == "injected" else make
    _, states = run(constructor(refresh_every=refresh_every), draw((3,), 8))
    [stack] = getattr(states, "inner_state", states).stacks
    assert steps_with_refresh(stack.block.refreshes[:, 0]) == [0, 3, 6]


def test_refreshes_at_a_growing_interval():
    _, states = run(record(refresh_every=rf.growing(3, base=2.0)), draw((3,), 16))
    assert steps_with_refresh(states.stacks[0].block.refreshes[:, 0]) == [0, 1, 2, 3, 5, 7, 10, 13]


@pytest.mark.parametrize(
    ("statistics_every", "taken"),
    [
        (None, {0: [], 4: [], 8: []}),
        (1, {0: [0], 4: [1, 2, 3, 4], 8: [5, 6, 7, 8]}),
        (3, {0: [0], 4: [3], 8: [6]}),
        (lambda count: count >= 5, {0: [], 4: [], 8: [5, 6, 7, 8]}),
    ],
    ids=["none", "1", "3", "callable"],
)
def test_a_refresh_has_the_statistics_of_every_gradient_that_was_due_since_the_last_one(statistics_every, taken):
    gradients = draw({"a": (4, 3), "b": (4, 3), "v": (5,)}, steps=10)
    options = {} if statistics_every is None else {"statistics_every": statistics_every}
    _, states = run(record(refresh_every=4, **options), gradients)
    matrices, vector = (stack.block for stack in states.stacks)
    for step, expected in taken.items():
        for found, name in ((vector.found[:, 0], "v"), (matrices.found[:, 0], "a"), (matrices.found[:, 1], "b")):
            total = gradients[name][expected].sum(axis=0)
            np.testing.assert_allclose(found[step], total, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(matrices.sample[step, 1], gradients["b"][step])


def test_blocks_that_are_refreshed_in_turn_each_have_the_statistics_since_their_own():
    gradients = draw({"a": (4, 3, 3)}, steps=9)
    layout = whole(layer_axes=0)
    _, states = run(record(refresh_every=rf.staggered(4), statistics_every=1, layout=layout), gradients)
    [block] = [stack.block for stack in states.stacks]
    for index in range(4):
        assert steps_with_refresh(block.refreshes[:, index]) == [step for step in range(9) if step % 4 == index]
        for step in range(index, 9, 4):
            since = gradients["a"][max(0, step - 3) : step + 1, index]
            np.testing.assert_allclose(block.found[step, index], since.sum(axis=0), rtol=1e-5, atol=1e-6)


SHAPES = {"seven": (7, 3, 4), "two": (2, 5, 2), "one": (6, 6), "vector": (3,)}
LAYOUT = whole(layer_axes={"seven": 0, "two": 0})


@pytest.mark.parametrize("period", [1, 3, 4, 10])
def test_in_a_period_every_block_is_refreshed_once_and_no_step_has_more_than_its_share(period):
    gradients = draw(SHAPES, steps=2 * period)
    _, states = run(record(refresh_every=rf.staggered(period), layout=LAYOUT), gradients)
    for stack in states.stacks:
        refreshes = np.diff(stack.block.refreshes, axis=0, prepend=0)
        assert refreshes.sum(axis=1).max() <= -(-refreshes.shape[1] // period)
        np.testing.assert_array_equal(refreshes[:period].sum(axis=0), 1)
        np.testing.assert_array_equal(refreshes[:period], refreshes[period:])
    # The seven are one stack: each was refreshed with its own gradient.
    [seven] = [stack.block for stack in states.stacks if stack.block.refreshes.shape[1] == 7]
    for index in range(7):
        (step, _) = steps_with_refresh(seven.refreshes[:, index])
        np.testing.assert_array_equal(seven.sample[step, index], gradients["seven"][step, index])


def test_stacks_of_few_blocks_begin_at_different_steps():
    _, states = run(record(refresh_every=rf.staggered(10), layout=LAYOUT), draw(SHAPES, steps=10))
    totals = sum(stack.block.refreshes.sum(axis=1) for stack in states.stacks)
    # 7 + 2 + 1 + 1 blocks in ten steps
    assert np.diff(totals, prepend=0).max() <= 2
    assert totals[-1] == 11


def test_a_long_stack_is_refreshed_portion_by_portion():
    """Its factors are more than are refreshed at once, and no multiple of a portion."""
    gradients = jax.tree.map(lambda g: g[0], draw({"a": (70, 64, 64)}, steps=1))
    tx = record(layout=whole(layer_axes=0))
    update = jax.jit(tx.update)
    assert "while" in update.lower(gradients, tx.init(gradients)).as_text()
    [stack] = update(gradients, tx.init(gradients))[1].stacks
    np.testing.assert_array_equal(stack.block.refreshes, np.ones(70))
    np.testing.assert_array_equal(stack.block.sample, gradients["a"])


@pytest.mark.contract
def test_portions_change_nothing(monkeypatch):
    """A stack whose blocks start at different steps, and whose length is no multiple of a portion."""
    shapes = {"a": (19, 4, 3)}
    gradients = draw(shapes, steps=3)
    gradients["a"][0, 5:] = 0
    make = lambda: rf.scale_by_sirf_shampoo(refresh_every=2, layout=whole(layer_axes=0))
    expected = run(make(), gradients)
    monkeypatch.setattr(step_module, "_MIN_ENTRIES_AT_ONCE", 1)
    jax.tree.map(
        lambda *pair: np.testing.assert_allclose(*pair, rtol=2e-5, atol=1e-6), run(make(), gradients), expected
    )


def test_blocks_that_are_refreshed_in_turn_divide_over_a_mesh():
    """Each device has its own turns, so that all have equal work at each step."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    gradients = jax.tree.map(lambda g: g[0], draw({"a": (24, 4, 4), "b": (3, 5, 5)}, steps=1))
    tx = record(layout=whole(layer_axes=0), refresh_every=rf.staggered(3), mesh_axes="data")
    placed = jax.device_put(gradients, NamedSharding(mesh, PartitionSpec()))
    state, update, history = tx.init(placed), jax.jit(tx.update), []
    for _ in range(3):
        _, state = update(placed, state)
        history.append([np.asarray(stack.block.refreshes).reshape(8, -1) for stack in state.stacks])
    for (long, short), step in zip(history, range(3), strict=True):
        np.testing.assert_array_equal(long.sum(axis=1), step + 1)
        assert short.shape == (8, 1)
    for stack, name in zip(state.stacks, ("a", "b"), strict=True):
        np.testing.assert_array_equal(stack.block.refreshes, 1)
        np.testing.assert_array_equal(stack.block.sample[: len(gradients[name])], gradients[name])


def test_intervals_out_of_range_are_refused():
    for name in ("refresh_every", "statistics_every"):
        for value in (0, 2.5, float("inf")):
            with refuses(ValueError, f"{name} must be a whole number of at least 1 and below 2³¹, got {value}"):
                record(**{name: value})
    for value in (0, 2.5, True, jnp.int32(3), rf.growing(10)):
        with refuses(ValueError, "period must be a whole number of at least 1, as a Python int"):
            rf.staggered(value)


def test_turns_work_under_inject_hyperparams():
    make = optax.inject_hyperparams(
        lambda refresh_every: record(refresh_every=refresh_every, layout=LAYOUT), "refresh_every"
    )
    gradients = draw(SHAPES, steps=3)
    _, expected = run(record(refresh_every=rf.staggered(3), layout=LAYOUT), gradients)
    _, states = run(make(refresh_every=rf.staggered(3)), gradients)
    jax.tree.map(np.testing.assert_array_equal, states.inner_state.stacks, expected.stacks)

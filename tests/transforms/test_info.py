"""Scalars to log, against the updates and factors themselves."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from meshes import FSDP, draw, mesh_of, shardings_on

import rootfree_optax as rf
from rootfree_optax._src.blocks.curvature import RootFree
from rootfree_optax._src.blocks.rf import CholeskyInverse
from rootfree_optax._src.blocks.sirf import PublishedRefresh

# Eight blocks of 4×4, four of 3×4 and one vector.
LAYOUT = rf.Layout(block_size=4, merge_dims=None, diagonal=None)
NAMES = {"refreshes", "refused", "shortened", "agreement", "idle_blocks", "update_rms", "scale_min", "scale_max"}


@dataclasses.dataclass(frozen=True)
class KeepsNothing(rf.BlockRule):
    def init(self, structures: Any, dtypes: Any) -> None:
        return None

    def precondition(self, state: Any, momentum: Any, **others: Any) -> Any:
        return momentum, state


def scale_by(rule: rf.BlockRule = RootFree(), **others: Any) -> optax.GradientTransformationExtraArgs:  # noqa: B008
    return rf.scale_by_kronecker(rule, damping=0.1, **{"layout": LAYOUT, "momentum": 0.9, **others})


def run(tx: optax.GradientTransformation, steps: int = 3, **changes: Any) -> tuple[Any, Any]:
    """Returns the last updates, and the state; `changes` take gradients' places."""
    params = draw(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, steps + 1):
        updates, state = update({**draw(seed), **changes}, state, params)
    return updates, state


@functools.cache
def default_run() -> tuple[Any, Any]:
    return run(scale_by())


def test_update_rms_is_that_of_all_entries() -> None:
    """Blocks have 16, 12 and 16 entries, so that their mean squares do not weigh alike."""
    updates, state = default_run()
    entries = np.concatenate([np.ravel(update) for update in updates.values()])
    found = rf.info(state)
    assert found.keys() == NAMES
    np.testing.assert_allclose(found["update_rms"], np.sqrt(np.mean(entries**2)), rtol=1e-6)


def test_scales_are_the_extremes_of_all_factors() -> None:
    _, state = default_run()
    largest = [np.abs(k).max() for ks in rf.factors(state, draw(0), LAYOUT).values() for k in ks]
    found = rf.info(state)
    np.testing.assert_allclose([found["scale_min"], found["scale_max"]], [min(largest), max(largest)], rtol=1e-6)
    assert found["scale_min"] < found["scale_max"]


def test_idle_blocks_are_those_without_a_gradient() -> None:
    gradient = draw(1)["up"]
    gradient[:, 4:12] = 0  # two blocks of four
    tx = scale_by()
    assert rf.info(tx.init(draw(0)))["idle_blocks"] == 13
    _, state = run(tx, up=gradient, bias=np.zeros(16, np.float32))
    assert rf.info(state)["idle_blocks"] == 3
    assert rf.info(default_run()[1])["idle_blocks"] == 0


@pytest.mark.parametrize(
    ("refresh_every", "steps", "expected"),
    [
        (1, 5, 5),
        (3, 7, 3),  # at steps 0, 3 and 6
        (lambda count: count < 2, 5, 2),
        (rf.staggered(4), 7, 1),
        (rf.staggered(4), 8, 2),
    ],
)
def test_refreshes_are_counted(refresh_every: Any, steps: int, expected: int) -> None:
    """By the transformation, whatever the rule."""
    assert rf.info(run(scale_by(KeepsNothing(), refresh_every=refresh_every), steps)[1])["refreshes"] == expected


def test_refused_refreshes_and_shortened_steps_are_counted() -> None:
    huge = np.full((4, 16), 1e30, np.float32)
    _, state = run(scale_by(PublishedRefresh(), weight=0.1), up=huge)
    found = rf.info(state)
    assert found["refused"] == 3 * 4
    assert "shortened" not in found
    _, state = run(scale_by(RootFree(step_size="newton", trust_radius=1e-3)))
    assert rf.info(state)["shortened"] == 3 * 13
    assert rf.info(state)["refused"] == 0


@pytest.mark.contract
@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (RootFree(), AxisType.Explicit),
        (PublishedRefresh(), AxisType.Auto),
    ],
    ids=["explicit", "auto"],
)
def test_padding_to_a_mesh_counts_for_nothing(rule: rf.BlockRule, kind: AxisType) -> None:
    zeros = np.zeros(16, np.float32)
    expected = rf.info(run(scale_by(rule), bias=zeros)[1])
    mesh = mesh_of(kind, 8)
    shardings = shardings_on(mesh, FSDP)
    put = lambda tree: jax.device_put(tree, shardings)
    tx = scale_by(rule, mesh_axes="data")
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(put(draw(0)))
        assert rf.info(state)["idle_blocks"] == 13
        update = jax.jit(tx.update)
        for seed in (1, 2, 3):
            _, state = update(put({**draw(seed), "bias": zeros}), state, put(draw(0)))
        found = jax.jit(rf.info)(state)
        eager = rf.info(state)
    assert sum(len(stack.size) for stack in state.stacks) == (32 if kind is AxisType.Explicit else 24) > 13
    for scalars in (found, eager):
        assert scalars.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(scalars[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.contract
def test_several_transformations_count_together() -> None:
    parts = {"x": scale_by(refresh_every=2), "y": scale_by(CholeskyInverse(), layout=rf.Layout(diagonal=None))}
    labels = {"up": "x", "down": "y", "odd": "x", "bias": "y"}
    tx = optax.chain(optax.partition(parts, labels), optax.scale(-1.0))
    _, state = run(tx, 4, bias=np.zeros(16, np.float32), up=np.zeros((4, 16), np.float32))
    found = rf.info(state)
    assert (found["refreshes"], found["idle_blocks"], found["refused"]) == (4, 1 + 4, 0)


def test_works_in_jit_and_of_shapes_alone() -> None:
    _, state = default_run()
    abstract = jax.eval_shape(rf.info, state)
    assert {name: leaf.shape for name, leaf in abstract.items()} == dict.fromkeys(NAMES, ())
    jitted = jax.jit(rf.info)(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, rf.info(state))


def test_what_is_not_kept_is_left_out() -> None:
    updates, state = run(scale_by(KeepsNothing()))
    found = rf.info(state)
    assert found.keys() == {"refreshes", "idle_blocks", "update_rms"}
    entries = np.concatenate([np.ravel(update) for update in updates.values()])
    np.testing.assert_allclose(found["update_rms"], np.sqrt(np.mean(entries**2)), rtol=1e-6)
    nothing = rf.info(scale_by().init({}))
    assert {name: float(value) for name, value in nothing.items()} == dict.fromkeys(found, 0.0)


def test_a_state_without_kronecker_transformations_is_refused() -> None:
    with pytest.raises(ValueError, match=r"info needs the state of a Kronecker transformation, .*ScaleByAdamState"):
        rf.info(optax.adam(0.1).init(draw(0)))

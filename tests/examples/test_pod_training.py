"""The example for pods trains on eight simulated devices, and goes on from its checkpoint on another mesh."""

import pathlib

import jax
import numpy as np
import pod_training
import pytest
from jax.sharding import AxisType

pytestmark = [pytest.mark.research, pytest.mark.usefixtures("standard_promotion")]


def train(steps: int, sizes: tuple[int, int], folder: pathlib.Path) -> list[float]:
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        return pod_training.train(steps, mesh, folder)


def test_learns_and_goes_on_on_another_mesh(tmp_path: pathlib.Path) -> None:
    whole = train(60, (4, 2), tmp_path / "whole")
    assert abs(whole[0] - np.log(256)) < 1
    assert np.mean(whole[-5:]) < whole[0] - 1.5
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "50").rename(tmp_path / "part" / "50")
    part = train(60, (2, 4), tmp_path / "part")
    np.testing.assert_allclose(part, whole[50:], rtol=1e-3)

"""The example for pods trains on eight simulated devices, learns, and goes on from its checkpoint on another mesh."""

import json
import pathlib

import matplotlib.image
import numpy as np
import pod_training
import pytest

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_trains_over_a_mesh_and_goes_on_on_another(tmp_path: pathlib.Path) -> None:
    sizes = ["--layers", "1", "--width", "32", "--heads", "2", "--length", "16", "--batch-size", "8"]
    settings = [*sizes, "--steps", "40", "--save-every", "20"]
    whole = pod_training.main([*settings, "--tensor", "2", "--output", str(tmp_path / "whole")])
    assert len(whole) == 40
    assert abs(whole[0] - np.log(256)) < 1
    assert whole[-1] < whole[0] - 0.2
    record = json.loads((tmp_path / "whole" / "pod_training.json").read_text())
    assert record["losses"] == whole
    assert np.isfinite(record["validation_loss"])
    picture = matplotlib.image.imread(tmp_path / "whole" / "pod_training.png")[..., :3]
    for color in ("#56B4E9", "#0072B2"):  # the mini-batches' losses, and their running mean
        assert (np.abs(picture - matplotlib.colors.to_rgb(color)).max(axis=-1) < 0.05).sum() > 20

    checkpoints = tmp_path / "part" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "20").rename(checkpoints / "20")
    part = pod_training.main([*settings, "--tensor", "4", "--output", str(tmp_path / "part")])
    assert part[:20] == whole[:20]
    np.testing.assert_allclose(part[20:], whole[20:], rtol=2e-2)  # activations are in bfloat16


def test_refuses_a_mesh_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="must divide the number of devices, 8, got 3"):
        pod_training.make_mesh(3)

"""How long an accelerator works on some steps, whatever their program takes to hand them over."""

import pathlib
import tempfile

import jax

from harness import turns


def seconds(step: turns.Step, count: int) -> float | None:
    """Returns the time that kernels run for so many steps, by the profiler; None where no GPU has run any."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step(count)
        [path] = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    kernels = [
        event.duration_ns
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return sum(kernels) * 1e-9 if kernels else None

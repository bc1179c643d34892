"""An exported training step goes on from a stored state in a process that knows nothing of this package."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import optax
import pytest
from checks import assert_close, make_gradients, make_params
from contract import ALL, REPRESENTATIVES, tolerance_of

TWO_STEPS_EACH = """
import pathlib, pickle, sys
import jax.export
for program in pathlib.Path(sys.argv[1]).glob("*.program"):
    params, leaves, gradient = pickle.loads(program.with_suffix(".before").read_bytes())
    step = jax.export.deserialize(bytearray(program.read_bytes())).call
    for _ in range(2):
        params, leaves = step(params, leaves, gradient)
    program.with_suffix(".after").write_bytes(pickle.dumps(jax.device_get((params, leaves))))
assert not any(name.startswith(("rootfree_optax", "optax")) for name in sys.modules)
"""


def step_of(tx: optax.GradientTransformation, structure: Any) -> Callable[..., Any]:
    """Returns a step in which the state crosses as its leaves: `jax.export` knows no tuples with names."""

    @jax.jit
    def step(params: Any, leaves: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, jax.tree.unflatten(structure, leaves), params)
        return optax.apply_updates(params, updates), jax.tree.leaves(state)

    return step


@pytest.mark.frameworks
def test_exported_steps_go_on_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    params = make_params()
    first, *others = make_gradients(params, 2)
    cases, expected = [case for case in ALL if case.name in REPRESENTATIVES], []
    for case in cases:
        leaves, structure = jax.tree.flatten(case().init(params))
        step = step_of(case(), structure)
        before = *step(params, leaves, first), *others
        (tmp_path / f"{case.name}.before").write_bytes(pickle.dumps(jax.device_get(before)))
        (tmp_path / f"{case.name}.program").write_bytes(jax.export.export(step)(*before).serialize())
        expected.append(step(*step(*before), *others))

    subprocess.run([sys.executable, "-c", TWO_STEPS_EACH, tmp_path], check=True)
    for case, after in zip(cases, expected, strict=True):
        assert_close(pickle.loads((tmp_path / f"{case.name}.after").read_bytes()), after, tolerance_of(case))

"""Steps of the official PyTorch optimizer, which lives in another Python environment, over a pipe."""

import contextlib
import json
import os
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
import trees

from harness import turns

SCRIPT = pathlib.Path(__file__).with_name("official_worker.py")
SETTINGS = {
    "lr": 1e-3,
    "beta2": 1e-2,
    "alpha1": 0.9,
    "alpha2": 0.5,
    "lam": 1e-3,
    "kappa": 0.0,
    "T": 10,
    "batch_size": 32,
}


class Worker:
    """A program that answers each line of JSON with a line of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Takes a process whose standard streams are pipes of text."""
        self._process = process

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a message and returns the answer.

        Raises:
          RuntimeError: if the program ended, with what it wrote to its standard error.
        """
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            errors = self._process.stderr.read() if self._process.stderr else ""
            raise RuntimeError(f"the program {self._process.args} ended: {errors}")
        return json.loads(line)


@contextlib.contextmanager
def worker(python: str, script: pathlib.Path) -> Iterator[Worker]:
    """Yields a running worker, and ends it afterwards.

    Args:
      python: the interpreter of the other environment.
      script: what it runs.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen([python, str(script)], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def threads() -> int:
    """Returns how many threads every program gets: as many as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def request(shapes: trees.Shapes, *, preconditioner_dtype: str | None = None) -> dict[str, Any]:
    """Returns what the official optimizer is asked: these shapes, on JAX's own kind of device, as precise in float32.

    Args:
      shapes: the parameters'.
      preconditioner_dtype: of the factors; None is the parameters'.

    Raises:
      ValueError: on an accelerator that PyTorch is not timed on.
    """
    backend = jax.default_backend()
    devices = {"cpu": "cpu", "gpu": "cuda"}
    if backend not in devices:
        raise ValueError(f"the official optimizer runs on cpu and gpu, got {backend!r}. Leave out --official-python.")
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return {
        "shapes": trees.shapes_of(shapes),
        "settings": SETTINGS,
        "preconditioner_dtype": preconditioner_dtype,
        "threads": threads(),
        "device": devices[backend],
        "float32_products": "highest" if exact or backend == "cpu" else "high",
    }


def step(worker: Worker, count: int) -> turns.Seconds:
    """Makes so many steps of the official optimizer."""
    answer = worker.ask({"steps": count})
    return answer["seconds"], answer["process_seconds"]

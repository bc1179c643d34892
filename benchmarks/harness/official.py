"""Steps of an optimizer that lives in another Python environment, over a pipe."""

import contextlib
import json
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any


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

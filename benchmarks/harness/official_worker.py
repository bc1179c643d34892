"""The official PyTorch SIRFShampoo as a separate program that times its own steps on request.

It runs in an environment of its own, which has PyTorch and sirfshampoo and need not have JAX, and speaks JSON, one
object per line. It first reads {"shapes": [...], "settings": {...}, "threads": n, "device": "cpu" or "cuda",
"float32_products": "highest" or "high", "preconditioner_dtype": name or null} and answers {"versions": {...}, "device":
name, "state_bytes": n}. "high" lets a GPU round the factors of float32 products to TF32. To every further line,
{"steps": n}, it makes n steps, waits until the device is done, and answers {"seconds": t, "process_seconds": t}: what
they took by the clock, and of CPU time.
"""

import importlib.metadata
import json
import math
import sys
import time
from typing import Any

import torch
from sirfshampoo import SIRFShampoo


class Parameters(torch.nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, shapes: list[list[int]]) -> None:
        """Draws a parameter and a gradient of each shape."""
        super().__init__()
        draw = lambda shape: torch.randn(*shape)
        self.arrays = torch.nn.ParameterList([torch.nn.Parameter(draw(shape)) for shape in shapes])
        for parameter in self.arrays:
            parameter.grad = 1e-2 * draw(parameter.shape)


def _answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _state_bytes(optimizer: SIRFShampoo, shapes: list[list[int]]) -> int:
    kept = (*optimizer.preconditioner, *optimizer.preconditioner_momenta)
    factors = sum(matrix.to_dense().nbytes for matrices in kept for matrix in matrices)
    return factors + 4 * sum(map(math.prod, shapes))


def main() -> None:
    """Sets up, then makes one step per line read."""
    request = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    torch.set_num_threads(request["threads"])
    torch.set_float32_matmul_precision(request["float32_products"])
    torch.set_default_device(request["device"])
    is_gpu = request["device"] == "cuda"
    wait = torch.cuda.synchronize if is_gpu else lambda: None
    name = request["preconditioner_dtype"]
    dtype = name and getattr(torch, name)
    optimizer = SIRFShampoo(Parameters(request["shapes"]), preconditioner_dtypes=dtype, **request["settings"])
    packages = ("torch", "sirfshampoo", "singd")
    versions = {package: importlib.metadata.version(package) for package in packages}
    device = torch.cuda.get_device_name() if is_gpu else "cpu"
    _answer({"versions": versions, "device": device, "state_bytes": _state_bytes(optimizer, request["shapes"])})
    for line in sys.stdin:
        wait()
        start, process_start = time.perf_counter(), time.process_time()
        for _ in range(json.loads(line)["steps"]):
            optimizer.step()
        wait()
        process_seconds, seconds = time.process_time() - process_start, time.perf_counter() - start
        _answer({"seconds": seconds, "process_seconds": process_seconds})


if __name__ == "__main__":
    main()

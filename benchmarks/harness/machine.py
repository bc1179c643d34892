"""Describes where and with what a benchmark ran. Figures of different machines do not compare."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "optax", "rootfree-optax")
# What changes how fast all programs of a run are.
VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS")


def describe() -> dict[str, Any]:
    """Returns processor, cores, accelerator, versions, date, load and environment, all of them ready for JSON."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def on_accelerator() -> bool:
    """Returns whether steps run elsewhere than on the processor that hands them over, many at once."""
    return jax.default_backend() != "cpu"


def summary(machine: dict[str, Any]) -> str:
    """Returns a description of `describe` in one line."""
    versions = ", ".join(f"{package} {machine[package]}" for package in PACKAGES)
    environment = "".join(f", {name}={value}" for name, value in machine["environment"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['devices']} × {machine['device']}, {versions}, "
        f"Python {machine['python']}, {machine['date']}, load {machine['load_average']} at the start{environment}"
    )


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""What figures are measured on: the machine and the commit."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gpu_name() -> str:
    """The current CUDA device's name."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return str(properties["name"].decode())


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found

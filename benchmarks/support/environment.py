"""What figures are measured on: the machine and the commit."""

from __future__ import annotations

import subprocess
import sys
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


def command(file: str) -> str:
    """The command line of this process, whose module is that file of this checkout."""
    module = Path(file).relative_to(Path(__file__).parents[2]).with_suffix("")
    return " ".join(["python", "-m", ".".join(module.parts), *sys.argv[1:]])


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    installed = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed

"""Clean virtual environments: made, filled by pip, and measured."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any

from losart.errors import LosartError
from losart.measure.footprint.processes import run
from losart.version import __version__

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LIST = "import json; from importlib.metadata import distributions as d; "
LIST += "print(json.dumps({x.name: x.version for x in d()}))"


class Environment:
    """A new virtual environment with pip, and what it takes before anything is installed.

    Parameters
    ----------
    folder : path

    Attributes
    ----------
    python : path
        Its interpreter.
    """

    def __init__(self, folder: Path) -> None:
        run([sys.executable, "-m", "venv", str(folder)], {}, f"python -m venv {folder}")
        self.python = folder / "bin" / "python"
        self._folder = folder
        self._empty_bytes = folder_bytes(folder)
        self._empty_packages = packages_of(self.python)  # pip and what comes with it

    def install(self, *arguments: str) -> None:
        """What `pip install` with these arguments does.

        Raises
        ------
        LosartError
            pip failed.
        """
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
        pip = [str(self.python), "-I", "-m", "pip", "install", *quiet]
        run([*pip, *arguments], {}, f"pip install {' '.join(arguments)}")

    def sizes(self) -> dict[str, Any]:
        """`installed_bytes` and `packages`, names to versions, of what was installed."""
        packages = packages_of(self.python)
        for name in self._empty_packages:
            packages.pop(name, None)
        return {"installed_bytes": folder_bytes(self._folder) - self._empty_bytes, "packages": packages}


def packages_of(python: str | os.PathLike[str]) -> dict[str, str]:
    """Names and versions of the packages of an interpreter."""
    return json.loads(run([str(python), "-I", "-c", LIST], {}, str(python)))


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files, links not followed."""
    files = (Path(parent, name).lstat() for parent, _, names in os.walk(folder) for name in names)
    return sum(file.st_size for file in files if stat.S_ISREG(file.st_mode))


def own_requirement(extra: str = "") -> str:
    """The requirement by which pip installs losart from where the running one came.

    That is the folder, file or repository that its installation recorded (PEP 610), else this version
    from the index.

    Raises
    ------
    LosartError
        It is not installed, but on the path.
    """
    try:
        recorded = distribution("losart").read_text("direct_url.json")
    except PackageNotFoundError:
        raise LosartError("losart is not installed here; say by --losart what pip is to install") from None
    name = f"losart[{extra}]" if extra else "losart"
    if recorded is None:
        return f"{name}=={__version__}"
    origin = json.loads(recorded)
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        return f"{name} @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    return f"{name} @ {origin['url']}"


def rival_requirements() -> list[str]:
    """torch and transformers as losart's extra `parity` names them."""
    lines = requires("losart") or []
    named = [
        line.split(";")[0].strip() for line in lines if re.search(r"extra\s*==\s*['\"]parity['\"]", line)
    ]
    return [line for line in named if re.split("[<>=]", line)[0] in ("torch", "transformers")]


def cpu_index_arguments() -> list[str]:
    """Arguments of pip that let it find torch's CPU build, none where its index cannot be reached."""
    try:
        urllib.request.urlopen(urllib.request.Request(f"{TORCH_CPU_INDEX}/torch/", method="HEAD"), timeout=5)
    except OSError:
        return []
    return ["--extra-index-url", TORCH_CPU_INDEX]

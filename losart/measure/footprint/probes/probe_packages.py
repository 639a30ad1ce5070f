"""What an installed package takes on disk with all that it requires, in the interpreter that runs this.

The command line has a request in JSON: `packages`, names to the extras that are wanted, and `folders`
whose files count too. Prints `packages`, names to versions; `not_installed`, names that are required
and missing; and `installed_bytes`: the sizes of all files in the packages' RECORDs that exist, each
counted once. Compiled files (.pyc) are left out: some installers write them and others do not.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def main() -> None:
    request = json.loads(sys.argv[-1])
    for name in request["packages"]:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed for {sys.executable}") from None
    packages, missing = closure(request["packages"])
    files = {os.path.realpath(file) for package in packages.values() for file in recorded(package)}
    files |= {os.path.realpath(file) for folder in request["folders"] for file in Path(folder).rglob("*")}
    report = {
        "installed_bytes": sum(map(size, files)),
        "packages": {package.name: package.version for package in packages.values()},
        "not_installed": sorted(missing),
    }
    print(json.dumps(report))


def closure(packages: dict[str, list[str]]) -> tuple[dict[str, Distribution], set[str]]:
    """Packages with all that they require here, by name; and the names of those that are missing."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    installed: dict[str, Distribution] = {}
    missing: set[str] = set()
    done: set[tuple[str, str]] = set()
    waiting = [(name, extra) for name, extras in packages.items() for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            installed[name] = distribution(name)
        except PackageNotFoundError:
            missing.add(name)
            continue
        for requirement in map(Requirement, installed[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, further) for further in ("", *requirement.extras)]
    return installed, missing


def recorded(package: Distribution) -> Iterator[str]:
    """Files that the installation of a package recorded."""
    files: Iterable[os.PathLike[str]] | None = package.files
    if files is None:
        raise SystemExit(f"{package.name} {package.version} has no RECORD of its files")
    return (str(package.locate_file(file)) for file in files)


def size(file: str) -> int:
    """Bytes of a file; 0 of what does not exist, is not a regular file, or is compiled."""
    try:
        status = os.lstat(file)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) and not file.endswith(".pyc") else 0

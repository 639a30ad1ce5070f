"""Imports go one way: from folder to folder down the ranks below, and never in a circle."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {"losart": "losart", "loaders": "losart.loaders", "kernels_cu": "losart.kernels_cu"}  # by folder
RANKS = {
    "losart.errors": 0,
    "losart.version": 0,
    "losart.config": 1,
    "losart.observe": 2,
    "losart.loaders": 2,
    "losart.kernels_cu": 2,
    "losart.structured": 2,
    "losart.engine": 3,
    "losart.backends": 4,
    "losart.attention": 5,
    "losart.models": 6,
    "losart.quantization": 7,
    "losart.api": 8,
    "losart.ray": 9,
    "losart.eval": 9,
    "losart.measure": 9,
    "losart.server": 9,
    "losart.cli": 10,
    "losart": 11,  # losart/__init__.py, which users import and nothing else does
}
# Scripts of processes that are measured, which import losart as users do.
PROBES = "losart.measure.footprint.probes."
TOP_FILES = 6

Imports = dict[str, set[str]]  # by module; what is not of these packages is left out

CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|[^#\n]+)|c?import[ \t]+([\w.]+)(.*))",
    re.MULTILINE,
)


def modules(root: Path) -> dict[str, list[Path]]:
    """The files of each module: a Cython module can have two."""
    files: dict[str, list[Path]] = {}
    for folder, package in PACKAGES.items():
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".pyx", ".pxd"):
                parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                files.setdefault(name, []).append(file)
    return files


def imported(file: Path, package: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a file imports, wherever it does: modules, with the names that are taken from each.

    `import losart.x` binds the name of the facade: that is an import of it, too.
    """
    if file.suffix != ".py":
        for module, names, plain, rest in CYTHON_IMPORT.findall(file.read_text()):
            yield module or plain, tuple(re.findall(r"\w+", names))
            if plain and " as " not in rest:
                yield plain.split(".")[0], ()
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
                if alias.asname is None:
                    yield alias.name.split(".")[0], ()
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])]), tuple(alias.name for alias in node.names)


def imports(root: Path) -> Imports:
    """What each module imports."""
    files = modules(root)
    graph: Imports = {name: set() for name in files}
    for name, paths in files.items():
        for path in paths:
            package = name if path.stem == "__init__" else name.rpartition(".")[0]
            for module, names in imported(path, package):
                if module.split(".")[0] == "losart" and not name.startswith(PROBES):
                    submodules = {f"{module}.{one}" for one in names} & files.keys()
                    graph[name] |= (
                        submodules if names and len(submodules) == len(names) else {module, *submodules}
                    )
        graph[name].discard(name)  # a Cython module's own declarations
    return graph


def violations(graph: Imports) -> list[str]:
    """Imports that do not go down the ranks, and those of missing modules."""
    wrong = []
    for name, targets in graph.items():
        for target in sorted(targets):
            layers = [".".join(module.split(".")[:2]) for module in (name, target)]
            ranks = [RANKS.get(layer, -1) for layer in layers]
            if target not in graph:
                wrong.append(f"{name} imports {target}, which is missing")
            elif -1 in ranks:
                wrong.append(f"{layers[ranks.index(-1)]} has no rank")
            elif layers[0] != layers[1] and ranks[0] <= ranks[1]:
                wrong.append(f"{name} (rank {ranks[0]}) imports {target} (rank {ranks[1]})")
    return wrong


def cycle(graph: Imports) -> list[str]:
    """Modules that import each other in a circle; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_go_down_the_ranks():
    assert violations(imports(REPOSITORY)) == []


def test_no_modules_import_each_other():
    assert cycle(imports(REPOSITORY)) == []


def test_few_files_lie_at_the_top():
    listed = subprocess.run(["git", "ls-files", "losart"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    top = [file for file in listed.stdout.splitlines() if file.count("/") == 1]
    assert 0 < len(top) <= TOP_FILES, top


# The checks themselves, on trees that are made up.

CLEAN = {
    "losart/__init__.py": "from losart.api.model import load\nfrom losart.version import __version__",
    "losart/version.py": "",
    "losart/errors.py": "import math, sys",
    "losart/config/model.py": "from losart.errors import E",
    "losart/backends/cpu/kv_index.pyx": "from losart.backends.cpu.simd cimport (\n    a,\n    b)",
    "losart/backends/cpu/kv_index.pxd": "cimport cython",
    "losart/backends/cpu/simd.pxd": 'cdef extern from "simd.h":\n    int a',
    "losart/api/model.py": "from ..config import model\nimport losart.backends.cpu.kv_index as index",
    "losart/measure/footprint/probes/probe_losart.py": "import losart",
    "loaders/__init__.py": "from losart.loaders.hub import get",
    "loaders/hub.py": "from losart.config.model import ModelConfig",
    "kernels_cu/__init__.py": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for package in ("config", "backends", "backends/cpu", "api"):
        (tmp_path / "losart" / package).mkdir(parents=True)
        (tmp_path / "losart" / package / "__init__.py").touch()
    write(tmp_path, CLEAN)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_clean_tree_passes(tree):
    graph = imports(tree)
    assert violations(graph) == [] and cycle(graph) == []
    assert graph["losart.api.model"] == {"losart.config.model", "losart.backends.cpu.kv_index"}
    assert graph["losart.backends.cpu.kv_index"] == {"losart.backends.cpu.simd"}
    assert graph["losart.loaders"] == {"losart.loaders.hub"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "losart/config/model.py",
            "from losart.api.model import load",
            "losart.config.model (rank 1) imports",
        ),
        ("losart/config/model.py", "def f():\n    from losart.api import model", "imports losart.api.model"),
        ("losart/config/model.py", "if TYPE_CHECKING:\n    from ..api.model import M", "losart.api.model"),
        ("losart/config/model.py", "from losart.loaders import get", "imports losart.loaders (rank 2)"),
        ("loaders/hub.py", "import losart.kernels_cu as k", "losart.loaders.hub (rank 2) imports"),
        ("losart/api/model.py", "import losart", "imports losart (rank 11)"),
        ("losart/api/model.py", "from losart import __version__", "imports losart (rank 11)"),
        ("losart/api/model.py", "import losart.errors", "imports losart (rank 11)"),
        (
            "losart/backends/cpu/simd.pxd",
            "from losart.api.model cimport x",
            "losart.backends.cpu.simd (rank 4)",
        ),
        (
            "losart/backends/cpu/simd.pxd",
            "cimport losart.api.model as m",
            "losart.backends.cpu.simd (rank 4)",
        ),
        (
            "losart/api/model.py",
            "def f():\n    from losart.engine.gone import x",
            "losart.engine.gone, which is missing",
        ),
        ("losart/new/thing.py", "from losart.errors import E", "losart.new has no rank"),
    ],
)
def test_a_violation_is_found(tree, file, text, message):
    write(tree, {file: text})
    [wrong] = violations(imports(tree))
    assert message in wrong


@pytest.mark.parametrize(
    "changes",
    [
        {
            "losart/config/rope.py": "from losart.config import model",
            "losart/config/model.py": "import losart.config.rope as r",
        },
        {
            "losart/config/rope.py": "from .model import M",
            "losart/config/model.py": "def f():\n    from losart.config.rope import g",
        },
        {
            "losart/config/__init__.py": "from losart.config.model import M",
            "losart/config/model.py": "from losart.config import N",
        },
        {"losart/backends/cpu/simd.pxd": "from losart.backends.cpu.kv_index cimport PageTable"},
    ],
)
def test_a_circle_is_found(tree, changes):
    write(tree, changes)
    assert len(cycle(imports(tree))) == 3

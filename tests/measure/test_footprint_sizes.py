"""Sizes on disk of `losart footprint`: of new environments, and of what an interpreter has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import losart
from losart.cli import main
from losart.errors import LosartError
from losart.measure.footprint import environments, sides

BUILT_FOR_CUDA = {"torch/__init__.py": b"", "torch/version.py": b"cuda = '13.0'\n"}


def write_wheel(
    folder: Path, name: str, files: Mapping[str, bytes], requires: tuple[str, ...] = (), noted: str = ""
) -> Path:
    """A wheel of version 1.5; `noted` are further lines of its RECORD."""
    wheel = folder / f"{name.replace('-', '_')}-1.5-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-1.5.dist-info"
    lines = [f"Requires-Dist: {line}" for line in requires]
    contents = {
        **files,
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.5", *lines, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*contents, f"{info}/RECORD"]) + noted
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in contents.items():
            archive.writestr(file, content)
    return wheel


def bytes_in(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def test_an_environment_counts_what_was_installed(tmp_path):
    wheel = write_wheel(tmp_path, "small", {"small.bin": bytes(100_000)})
    environment = environments.Environment(tmp_path / "venv")
    assert environment.sizes() == {"installed_bytes": 0, "packages": {}}
    environment.install("--no-index", str(wheel))
    sizes = environment.sizes()
    assert sizes["packages"] == {"small": "1.5"}
    assert 100_000 < sizes["installed_bytes"] < 110_000
    with pytest.raises(LosartError, match="pip install --no-index no-such-package"):
        environment.install("--no-index", "no-such-package")


def test_sizes_alone_of_new_environments(tmp_path, capsys):
    wheels = {
        "losart": [write_wheel(tmp_path, "losart", {"a.bin": bytes(2**20)})],
        "rival": [
            write_wheel(tmp_path, "torch", BUILT_FOR_CUDA | {"b.bin": bytes(9 * 2**20)}),
            write_wheel(tmp_path, "transformers", {"c.bin": bytes(2 * 2**20)}),
        ],
    }
    specs = [argument for side in wheels for file in wheels[side] for argument in (f"--{side}", str(file))]
    assert main(["footprint", "--sizes-only", "--device", "cuda", *specs]) == 0
    printed = capsys.readouterr()
    assert "losart 1.5, torch 1.5 (CUDA 13.0 build), transformers 1.5\n" in printed.out
    assert "| installed | 1 MiB | 11 MiB | 11.0x | 10x, met |\n| packages | 1 | 2 | 2.0x |" in printed.out
    assert "were there" not in printed.out and "import" not in printed.out
    assert printed.err.splitlines()[-1].startswith("installing transformers: 1 of 2 steps")


def test_what_installs_no_losart_is_said_so(tmp_path, capsys):
    wheel = write_wheel(tmp_path, "small", {"small.bin": b""})
    assert main(["footprint", "--sizes-only", "--losart", str(wheel), "--rival", str(wheel)]) == 1
    assert f"losart: pip install {wheel} installs no losart\n" in capsys.readouterr().err


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder of packages that interpreters find by PYTHONPATH, and its wheels."""
    wheels = {
        "torch": write_wheel(
            tmp_path,
            "torch",
            BUILT_FOR_CUDA | {"shared.bin": bytes(1000)},
            ("Small.Part[more]>=1; python_version > '3'", "never; python_version < '3'", "no-such-package"),
            noted="torch/__pycache__/version.pyc,,\ngone.bin,,\n",
        ),
        "transformers": write_wheel(tmp_path, "transformers", {"t.bin": bytes(10_000)}, ("torch",)),
        "small-part": write_wheel(
            tmp_path,
            "small-part",
            {"small.bin": bytes(200), "shared.bin": bytes(1000)},
            ("further; extra == 'more'", "unwanted; extra == 'less'"),
        ),
        "further": write_wheel(tmp_path, "further", {"further.bin": bytes(30)}, ("small-part",)),
        "unwanted": write_wheel(tmp_path, "unwanted", {"unwanted.bin": bytes(5)}),
        "never": write_wheel(tmp_path, "never", {"never.bin": bytes(5)}),
        "cupy-cuda12x": write_wheel(tmp_path, "cupy-cuda12x", {"cupy.bin": bytes(10**6)}),
    }
    folder = tmp_path / "packages"
    for wheel in wheels.values():
        zipfile.ZipFile(wheel).extractall(folder)
    (folder / "torch" / "__pycache__").mkdir()
    (folder / "torch" / "__pycache__" / "version.pyc").write_bytes(bytes(400))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return folder, wheels


def figures_of(capsys, *arguments: str) -> dict:
    assert main(["footprint", "--installed", "--sizes-only", "--json", "-", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_sizes_of_what_is_installed_are_those_of_the_requirements(installed, capsys):
    _, wheels = installed
    figures = figures_of(capsys)
    theirs = figures["transformers"]
    names = ("torch", "transformers", "small-part", "further")
    assert theirs["packages"] == dict.fromkeys(names, "1.5") and theirs["package_count"] == 4
    shared_once = sum(bytes_in(wheels[name]) for name in names) - 1000
    assert theirs["installed_bytes"] == shared_once
    assert theirs["not_installed"] == ["no-such-package"]
    assert theirs["requirements"] == ["torch", "transformers"] and theirs["torch_cuda"] == "13.0"


def test_losart_counts_however_it_is_installed(installed, capsys):
    ours = figures_of(capsys)["losart"]
    assert ours["packages"]["losart"] == losart.__version__ and "numpy" in ours["packages"]
    files = [file for file in Path(losart.__file__).parent.rglob("*") if file.is_file()]
    assert ours["installed_bytes"] > sum(f.stat().st_size for f in files if f.suffix != ".pyc")
    assert ours["requirements"] == ["losart"]


def test_with_cuda_losart_counts_with_its_extra(installed, capsys):
    plain = figures_of(capsys)["losart"]
    ours = figures_of(capsys, "--device", "cuda")["losart"]
    assert ours["requirements"] == ["losart[cuda12x]"] and ours["packages"]["cupy-cuda12x"] == "1.5"
    assert ours["installed_bytes"] > plain["installed_bytes"] + 10**6


def test_the_table_says_of_what_the_sizes_are(installed, capsys):
    assert main(["footprint", "--installed", "--sizes-only"]) == 0
    table = capsys.readouterr().out
    assert "of losart, and of torch and transformers, each with all that it requires.\n" in table
    assert "not counted: no-such-package.\n" in table


def test_a_build_of_torch_without_cuda_is_no_rival_on_cuda(installed, capsys):
    folder, _ = installed
    (folder / "torch" / "version.py").write_text("cuda = None\n")
    (folder / "torch" / "__pycache__" / "version.pyc").unlink()
    assert main(["footprint", "--installed", "--sizes-only", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "losart: torch 1.5 was built without CUDA\n"


def test_an_interpreter_without_the_rival_is_said_so(tmp_path, capsys):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    assert main(["footprint", "--installed", "--sizes-only", "--rival-python", python]) == 1
    error = capsys.readouterr().err
    assert f"torch is not installed for {python}" in error and error.count("\n") == 1


def test_losart_without_metadata_is_said_so(monkeypatch, capsys):
    def none(name: str) -> None:
        raise sides.PackageNotFoundError(name)

    monkeypatch.setattr(sides, "distribution", none)
    assert main(["footprint", "--installed", "--sizes-only"]) == 1
    error = capsys.readouterr().err
    assert str(Path(losart.__file__).parent) in error and "metadata" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("noted", "requirement"),
    [
        (None, f"losart[cuda12x]=={losart.__version__}"),
        ({"url": "file:///src", "dir_info": {"editable": True}}, "losart[cuda12x] @ file:///src"),
        (
            {"url": "https://host/r", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "losart[cuda12x] @ git+https://host/r@abc",
        ),
    ],
)
def test_losart_is_installed_from_where_it_came(monkeypatch, noted, requirement):
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if noted is None else json.dumps(noted)

    monkeypatch.setattr(environments, "distribution", lambda name: Distribution())
    assert environments.own_requirement("cuda12x") == requirement


def test_the_rival_is_the_oracle_of_the_tests():
    names = [re.split("[<>=]", line)[0] for line in environments.rival_requirements()]
    assert names == ["torch", "transformers"]

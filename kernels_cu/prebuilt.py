"""Kernels that were compiled ahead of time and come with the package, one archive per architecture.

An archive is a .tar.xz of cubins: they are so alike that they compress to a fifteenth of their size. Each is
named by a digest of all that it was compiled from, so that it is not used for any other source.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from losart.kernels_cu.compiler import cubin_name, write_atomically

FOLDER = Path(__file__).parent / "cubins"
SUFFIX = ".tar.xz"


def prebuilt_cubin(source: str, name: str, options: tuple[str, ...], architecture: str) -> bytes | None:
    """The cubin of a source, as `compile_cubin` would make it; None if it is not prebuilt."""
    cubins = _cubins(FOLDER / f"{architecture}{SUFFIX}")
    return cubins.get(cubin_name(source, name, options, architecture))


def prebuilt_counts() -> dict[str, int]:
    """The number of prebuilt kernels of each architecture that has any."""
    # Uncached: the cache would hold the cubins of all architectures.
    read = _cubins.__wrapped__
    counts = {path.name.removesuffix(SUFFIX): len(read(path)) for path in sorted(FOLDER.glob(f"*{SUFFIX}"))}
    return {architecture: count for architecture, count in counts.items() if count}


def write_archive(architecture: str, cubins: Mapping[str, bytes], folder: Path) -> Path:
    """Write the archive of an architecture, atomically; equal cubins make equal bytes.

    Parameters
    ----------
    architecture : str
    cubins : mapping of str to bytes
        By their `cubin_name`.
    folder : Path
        Created if it is missing.

    Returns
    -------
    Path
        The archive's.
    """
    import lzma
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in sorted(cubins):
            entry = tarfile.TarInfo(name)  # its time is fixed
            entry.size = len(cubins[name])
            archive.addfile(entry, io.BytesIO(cubins[name]))
    path = folder / f"{architecture}{SUFFIX}"
    write_atomically(path, lzma.compress(content.getvalue()))
    return path


@cache
def _cubins(path: Path) -> dict[str, bytes]:
    """All cubins of an archive, by name; none if it is missing or damaged."""
    try:
        # Imported here since some Pythons are built without lzma.
        import lzma
        import tarfile

        # All at once, since damage shows only at the end.
        content = io.BytesIO(lzma.decompress(path.read_bytes()))
        with tarfile.open(fileobj=content) as archive:
            return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    except FileNotFoundError:
        return {}
    except Exception as error:
        warnings.warn(f"prebuilt kernels are not used: {path} cannot be read ({error})", stacklevel=3)
        return {}

"""Compiles CUDA sources with NVRTC, which needs no device, and caches the results on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from losart.errors import DeviceError

ELF = b"\x7fELF"
DIGEST_BYTES = hashlib.sha256().digest_size
HOW_TO_INSTALL = "pip install 'losart[cuda12x]' or 'losart[cuda13x]', as fits the driver"


def architecture_of(capability: tuple[int, int]) -> str:
    """The architecture to compile for on a device of this compute capability."""
    # The a stands for Hopper's own instructions, which run on no other device.
    return "sm_90a" if capability == (9, 0) else "sm_{}{}".format(*capability)


def nvrtc_version() -> tuple[int, int]:
    """The compiler's version.

    Raises
    ------
    DeviceError
        CuPy, or the NVRTC that it looks for, is missing.
    """
    try:
        return _nvrtc().getVersion()
    except (ImportError, RuntimeError) as error:
        message = " ".join(str(error).split())  # CuPy's has several lines
        raise DeviceError(
            f"CuPy finds no NVRTC to compile CUDA kernels with ({message}); install one: {HOW_TO_INSTALL}"
        ) from error


def is_known(architecture: str) -> bool:
    """Whether the compiler at hand knows an architecture, "sm_90a".

    Raises
    ------
    DeviceError
        There is no compiler.
    """
    nvrtc_version()
    return int(architecture.removeprefix("sm_").rstrip("a")) in _nvrtc().getSupportedArchs()


def compile_cubin(source: str, name: str, options: tuple[str, ...], architecture: str) -> tuple[bytes, str]:
    """Compile a source.

    Parameters
    ----------
    source : str
        All of it: nothing can be included.
    name : str
        The source's name in the compiler's messages.
    options : tuple of str
    architecture : str
        A real one: "sm_90a".

    Returns
    -------
    cubin : bytes
    log : str
        The compiler's messages.

    Raises
    ------
    DeviceError
        It does not compile, or there is no compiler.
    """
    version = nvrtc_version()
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, name, (), ())
    try:
        try:
            nvrtc.compileProgram(program, (*options, f"-arch={architecture}"))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program).strip(" \n\0") or str(error)
            raise DeviceError(
                "NVRTC {}.{} cannot compile {} for {}:\n{}".format(*version, name, architecture, log)
            ) from error
        # CuPy drops the last byte, as if it ended a string; it is the highest byte of a small number.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program).strip(" \n\0")
    finally:
        nvrtc.destroyProgram(program)


def cubin_name(source: str, name: str, options: tuple[str, ...], architecture: str) -> str:
    """A cubin's name in caches and archives: whatever would change the cubin changes it, except for NVRTC."""
    key = hashlib.sha256(repr((source, options, architecture)).encode()).hexdigest()
    return f"{name}-{architecture}-{key}"


def cached_cubin(source: str, name: str, options: tuple[str, ...], architecture: str) -> bytes:
    """The cubin of a source, from disk if it was compiled before; parameters as of `compile_cubin`.

    Without NVRTC, a cubin that any version of it left on disk will do.
    """
    folder, key = cache_folder(), cubin_name(source, name, options, architecture)
    try:
        version = nvrtc_version()
    except DeviceError as error:
        for path in sorted(folder.glob(f"{key}-*.cubin")) if folder else ():
            if cubin := _read(path):
                return cubin
        shown = " ".join((*options, f"-arch={architecture}"))
        raise DeviceError(f"{name} is not prebuilt with {shown}, and {error}") from error
    if folder is None:
        return compile_cubin(source, name, options, architecture)[0]
    path = folder / "{}-{}.{}.cubin".format(key, *version)
    cubin = _read(path)
    if cubin is None:
        cubin, _ = compile_cubin(source, name, options, architecture)
        _write(path, cubin)
    return cubin


def cache_folder() -> Path | None:
    """The folder of cached cubins; None where there is no home directory."""
    if own := os.environ.get("LOSART_CACHE_DIR"):
        return Path(own) / "kernels"
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "losart" / "kernels"
    try:
        return Path.home() / ".cache" / "losart" / "kernels"
    except RuntimeError:
        return None


def _read(path: Path) -> bytes | None:
    """The cubin in a file of the cache; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    # The digest comes last, where tools that read the file as a cubin ignore it.
    cubin, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return cubin if cubin.startswith(ELF) and hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    """Put a cubin into the cache; where that is impossible, the next process compiles it again."""
    with suppress(OSError):
        write_atomically(path, cubin + hashlib.sha256(cubin).digest())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, whose folder is created if it is missing; nobody sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        complete = Path(folder) / path.name
        complete.write_bytes(content)
        complete.replace(path)


def _nvrtc() -> Any:
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc

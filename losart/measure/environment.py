"""What losart runs on. Nothing here fails: what is unknown is None."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import losart.backends.cpu.attention_kernels as kernels
import losart.backends.cpu.quantized_linear as quantized_linear
from losart.backends import cuda_problem
from losart.backends.cpu.pool import threads_in_use
from losart.config.precision import DTYPES, KV_FORMATS, QUANTIZED
from losart.kernels_cu.compiler import cache_folder, nvrtc_version
from losart.kernels_cu.prebuilt import prebuilt_counts
from losart.version import __version__

Fact = TypeVar("Fact")

# By `vectors_in_use` and machine; "" is any other.
PLAIN_VECTORS = {"x86_64": "SSE2", "aarch64": "NEON", "": "plain"}
KV = [*DTYPES, *KV_FORMATS]
VECTORS = {2: "AVX-512", 1: "AVX2"}


def _known(read: Callable[[], Fact]) -> Fact | None:
    """What `read` returns, or None where it fails: drivers and their libraries raise errors of many kinds."""
    try:
        return read()
    except Exception:
        return None


def environment() -> dict[str, Any]:
    """Versions, CPU, GPU or why there is none, formats, prebuilt and cached kernels; JSON types alone."""
    try:
        problem = cuda_problem()
    except Exception as error:
        problem = f"CuPy fails: {error}"
    return {
        "losart": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {"name": cpu_name(), "threads": threads_in_use(), "vectors": _vectors()},
        "gpu": _known(_gpu),
        "cuda_problem": problem,
        "cupy": _known(_cupy_version),
        "nvrtc": _known(lambda: "{}.{}".format(*nvrtc_version())),
        "formats": {device: {"weights": [*DTYPES, *codes], "kv": KV} for device, codes in QUANTIZED.items()},
        "prebuilt_kernels": prebuilt_counts(),
        "kernel_cache": _kernel_cache(),
    }


def cpu_name() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(": ", 1)[-1] for line in lines if line.startswith("model name")), platform.machine()
    )


def _vectors() -> str:
    dots = " with dot products" if platform.machine() == "aarch64" else " with VNNI"
    plain = PLAIN_VECTORS.get(platform.machine(), PLAIN_VECTORS[""])
    return VECTORS.get(kernels.vectors_in_use(), plain) + dots * quantized_linear.dots_in_use()


def _gpu() -> dict[str, Any]:
    """The device that losart would use."""
    from cupy import cuda

    device = cuda.Device()
    properties = cuda.runtime.getDeviceProperties(device.id)
    major, thousandths = divmod(cuda.runtime.driverGetVersion(), 1000)
    return {
        "name": properties["name"].decode(),
        "memory_bytes": properties["totalGlobalMem"],
        "capability": "{}.{}".format(*divmod(int(device.compute_capability), 10)),
        "driver": _known(_driver_version),
        "driver_cuda": f"{major}.{thousandths // 10}",
    }


def _driver_version() -> str | None:
    text = Path("/proc/driver/nvidia/version").read_text()
    match = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", text)
    return match.group(1) if match else None


def _cupy_version() -> str:
    import cupy

    return cupy.__version__


def _kernel_cache() -> dict[str, Any] | None:
    folder = cache_folder()
    if folder is None:
        return None
    sizes = _known(lambda: [file.stat().st_size for file in folder.glob("*.cubin")]) or []
    return {"folder": str(folder), "files": len(sizes), "bytes": sum(sizes)}

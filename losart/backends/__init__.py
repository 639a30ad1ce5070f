"""Backends: where the operations of a model run."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

from losart.backends.base import Backend
from losart.backends.cpu.backend import CpuBackend
from losart.config.model import ModelConfig
from losart.config.precision import Precision
from losart.errors import DeviceError, OptionError
from losart.kernels_cu import prebuilt_for
from losart.kernels_cu.compiler import HOW_TO_INSTALL, nvrtc_version

OLDEST_CAPABILITY = (8, 0)


def make_backend(
    device: str, config: ModelConfig, precision: Precision, deterministic: bool = False
) -> Backend:
    """The backend for a device.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        "auto" takes CUDA where it works, else the CPU; it warns where there is an NVIDIA device that it
        cannot use.
    config : ModelConfig
    precision : Precision
    deterministic : bool
        Whether a sequence's sums must not depend on what shares its passes.

    Raises
    ------
    OptionError
        There is no such device name.
    DeviceError
        The device, its driver or its software is missing.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', not {device!r}")
    if device != "cpu":
        problem = cuda_problem()
        if problem is None:
            from losart.backends.cuda.backend import CudaBackend

            return CudaBackend(config, precision, deterministic)
        if device == "cuda":
            raise DeviceError(f"device 'cuda' does not work here: {problem}")
        if has_nvidia_device():
            warnings.warn(f"running on the CPU: {problem}", stacklevel=2)
    return CpuBackend(config, precision, deterministic)


def cuda_problem() -> str | None:
    """What is missing for CUDA, None if nothing is."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed; install it: {HOW_TO_INSTALL} ({error})"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "there is no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no working driver and device ({error})"
    major, minor = divmod(int(cupy.cuda.Device().compute_capability), 10)
    if (major, minor) < OLDEST_CAPABILITY:
        return "the device has compute capability {}.{}; {}.{} is needed".format(
            major, minor, *OLDEST_CAPABILITY
        )
    if not prebuilt_for((major, minor)):
        try:
            nvrtc_version()
        except DeviceError as error:
            return str(error)
    return None


def has_nvidia_device(devices: Path = Path("/dev"), driver: str = "libcuda.so.1") -> bool:
    """Whether there is an NVIDIA device, without CuPy: by its file, else by asking the driver (WSL)."""
    if any(devices.glob("nvidia[0-9]*")):
        return True
    try:
        cuda = ctypes.CDLL(driver)
        count = ctypes.c_int()
        return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):  # no driver, or a library that is not one
        return False

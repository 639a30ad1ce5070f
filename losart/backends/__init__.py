"""Backends: where the operations of a model run."""

from __future__ import annotations

import warnings

from losart.backends.base import SparseBackend
from losart.backends.cpu.backend import CpuBackend
from losart.config.model import ModelConfig
from losart.errors import DeviceError, OptionError
from losart.kernels_cu import prebuilt_for
from losart.kernels_cu.compiler import HOW_TO_INSTALL, nvrtc_version

OLDEST_CAPABILITY = (8, 0)


def make_backend(device: str, config: ModelConfig, dtype: str) -> SparseBackend:
    """The backend for a device.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        "auto" takes CUDA where it works; where it does not it says so, once, and takes the CPU.
    config : ModelConfig
    dtype : {"float32", "bfloat16", "float16"}

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

            return CudaBackend(config, dtype)
        if device == "cuda":
            raise DeviceError(f"device 'cuda' does not work here: {problem}")
        warnings.warn(f"running on the CPU: {problem}", stacklevel=2)
    return CpuBackend(config, dtype)


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

"""Backends: where the operations of a model run."""

from losart.backends.base import Backend
from losart.backends.cpu import CpuBackend
from losart.config import ModelConfig
from losart.errors import DeviceError, OptionError


def make_backend(device: str, config: ModelConfig, dtype: str) -> Backend:
    """The backend for a device.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
    config : ModelConfig
    dtype : {"float32", "bfloat16", "float16"}

    Raises
    ------
    OptionError
        There is no such device name.
    DeviceError
        The device is not there.
    """
    if device in ("auto", "cpu"):
        return CpuBackend(config, dtype)
    if device == "cuda":
        raise DeviceError("device 'cuda' is not supported by this version of losart; use 'cpu' or 'auto'")
    raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', not {device!r}")

"""A kernel on a device, ready to be launched.

Kernels are launched through the driver, each allowed to start while the previous one still runs
(programmatic dependent launch, compute capability 9.0 and later), also within a captured graph: CuPy's
own launch cannot express that. Kernels themselves wait for what they read (common/overlap.cuh).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from losart.errors import DeviceError

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
SHARED_MEMORY_CARVEOUT, LARGEST_CARVEOUT = 9, 100  # CUfunction_attribute, percent
OVERLAP_CAPABILITY, OVERLAP_DRIVER = (9, 0), 12030


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


_OVERLAP = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
KEPT_CONFIGS = 1024  # of a kernel: blocks and pieces of a prompt come in few sizes
_C_TYPES = (ctypes.Structure, ctypes._SimpleCData)


class Kernel:
    """A loaded kernel.

    Parameters
    ----------
    name : str
    function : cupy.cuda.Function
    overlap : bool
        Whether it may start while the previous kernel still runs.
    """

    def __init__(self, name: str, function: Any, overlap: bool) -> None:
        from cupy.cuda import driver, get_current_stream

        self._name = name
        self._function = function  # keeps the module loaded
        self._handle = ctypes.c_void_p(function.ptr)
        self._attributes = int(overlap)
        self._current_stream = get_current_stream
        self._configs: dict[tuple[Any, ...], _Config] = {}
        if overlap:
            # An SM must be idle to divide its memory between L1 cache and shared memory anew: kernels with
            # different preferences would not run side by side.
            driver.funcSetAttribute(function.ptr, SHARED_MEMORY_CARVEOUT, LARGEST_CARVEOUT)
        self._shared_limit: int = driver.funcGetAttribute(
            driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, function.ptr
        )

    def __call__(
        self, grid: tuple[int, ...], threads: int, *args: Any, shared: int = 0, overlap: bool = True
    ) -> None:
        """Launch it on the current stream.

        Parameters
        ----------
        grid : tuple of int
        threads : int
            Per block.
        *args : cupy.ndarray, int, float, ctypes scalar or structure, or None
            An int goes as int, a float as float, None as a null pointer.
        shared : int
            Bytes of dynamic shared memory.
        overlap : bool
            Whether it may start while the previous kernel still runs, if it can.

        Raises
        ------
        DeviceError
            The driver refuses, for instance so much shared memory.
        """
        values = [_as_c(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        key = (grid, threads, shared, self._current_stream().ptr, overlap)
        config = self._configs.get(key) or self._new_config(key)
        status = driver().cuLaunchKernelEx(ctypes.byref(config), self._handle, pointers, None)
        if status:
            raise DeviceError(f"the kernel {self._name} could not be launched: {error_name(status)}")

    def _new_config(self, key: tuple[Any, ...]) -> _Config:
        grid, threads, shared, stream, overlap = key
        if shared > self._shared_limit:
            self._allow_shared(shared)
        if len(self._configs) == KEPT_CONFIGS:
            self._configs.clear()
        config = self._configs[key] = _Config(
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            (ctypes.c_uint * 3)(threads, 1, 1),
            shared,
            stream,
            ctypes.pointer(_OVERLAP),
            self._attributes if overlap else 0,
        )
        return config

    def _allow_shared(self, size: int) -> None:
        from cupy.cuda import driver

        limit = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        try:
            driver.funcSetAttribute(self._function.ptr, limit, size)
        except driver.CUDADriverError as error:
            raise DeviceError(
                f"the kernel {self._name} needs {size} bytes of shared memory, more than there is: {error}"
            ) from error
        self._shared_limit = size


@cache
def driver() -> Any:
    """The library of the CUDA driver."""
    return ctypes.CDLL("libcuda.so.1")


def _as_c(value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.c_int(value)
    if isinstance(value, _C_TYPES):
        return value
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None if value is None else value.data.ptr)


def error_name(status: int) -> str:
    """What the driver calls a status."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {status}"

"""Weights on their way from a checkpoint's mapped files to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np

from losart.backends.cpu.backend import narrow, widen
from losart.backends.cuda.pages import HELD_AS
from losart.errors import OutOfMemoryError

STAGING_BYTES = 32 << 20  # of pinned memory
# Errors that may mean it, and the status by which they do.
OUT_OF_MEMORY = {"OutOfMemoryError": 0, "CUDARuntimeError": 2, "CUDADriverError": 2, "CUBLASError": 3}


class WeightLoader:
    """Brings tensors to the current device piece by piece, so that the host never holds more than a few.

    Parameters
    ----------
    dtype : {"float32", "bfloat16", "float16"}
        In which weights are held.
    stream : cupy.cuda.Stream
        The current one. All work on weights is on it: an array that is freed may be used again at once.
    """

    def __init__(self, dtype: str, stream: Any) -> None:
        self._dtype = dtype
        self._stream = stream
        self._staging = cupy.cuda.alloc_pinned_memory(STAGING_BYTES)

    def matrix(self, *tensors: Any) -> Any:
        """Tensors [out_i, ...] as one array [sum of out_i, ...]."""
        rows = sum(tensor.shape[0] for tensor in tensors)
        matrix = cupy.empty((rows, *tensors[0].shape[1:]), HELD_AS[self._dtype])
        first = 0
        for tensor in tensors:
            self._fill(matrix[first : first + tensor.shape[0]].reshape(-1), tensor)
            first += tensor.shape[0]
        return matrix

    def vector(self, *tensors: Any) -> Any:
        """Tensors one after the other, in float32."""
        return cupy.asarray(np.concatenate([widen(tensor.array()) for tensor in tensors]))

    def _fill(self, out: Any, tensor: Any) -> None:
        """One tensor, through two halves of the staging memory: one is filled while the other travels."""
        source = tensor.array().reshape(-1)
        piece = STAGING_BYTES // 2 // out.itemsize
        staging = np.frombuffer(self._staging, out.dtype, 2 * piece).reshape(2, piece)
        copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        for turn, start in enumerate(range(0, out.size, piece)):
            half = turn % 2
            values = source[start : start + piece]
            if tensor.dtype != self._dtype:
                values = narrow(widen(values), self._dtype)
            copied[half].synchronize()
            staging[half, : len(values)] = values.view(out.dtype)
            out[start : start + piece].set(staging[half, : len(values)], stream=self._stream)
            copied[half].record(self._stream)
            tensor.release()
        self._stream.synchronize()
        del source, values
        tensor.release()


@contextmanager
def memory_errors(purpose: str) -> Iterator[None]:
    """Turn the out-of-memory errors of CuPy, the driver and cuBLAS into our own."""
    try:
        yield
    except Exception as error:
        status = OUT_OF_MEMORY.get(type(error).__name__)
        if status is None or status != getattr(error, "status", status):
            raise
        free, total = cupy.cuda.runtime.memGetInfo()
        raise OutOfMemoryError(
            f"no memory for {purpose}: {error}, {free >> 20} of the device's {total >> 20} MiB are free"
        ) from error

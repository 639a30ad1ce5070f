"""Weights on their way from a checkpoint's mapped files to the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np

from losart.backends.cpu.convert import float32_rows, narrow, widen
from losart.backends.cuda.results import Weight
from losart.config.precision import Format

STAGING_BYTES = 32 << 20  # of pinned memory


class WeightLoader:
    """Brings tensors to the current device piece by piece, so that the host never holds more than a few.

    Parameters
    ----------
    format : Format
        Of matrices.
    stream : cupy.cuda.Stream
        The current one. All work on weights is on it: an array that is freed may be used again at once.
    """

    def __init__(self, format: Format, stream: Any) -> None:
        self._format = format
        self._stream = stream
        self._staging = cupy.cuda.alloc_pinned_memory(STAGING_BYTES)

    def matrix(self, *tensors: Any) -> Weight:
        """Tensors [out_i, in] as one matrix [sum of out_i, in]."""
        rows = sum(tensor.shape[0] for tensor in tensors)
        values = cupy.empty((rows, tensors[0].shape[1]), self._format.bits_array)
        first = 0
        for tensor in tensors:
            self._fill(values[first : first + tensor.shape[0]].reshape(-1), tensor)
            first += tensor.shape[0]
        return Weight(values)

    def vector(self, *tensors: Any) -> Any:
        """Tensors one after the other, in float32."""
        return cupy.asarray(np.concatenate([widen(tensor.array()) for tensor in tensors]))

    def _fill(self, out: Any, tensor: Any) -> None:
        """Copy a tensor through two halves of the staging memory: one is filled while the other is copied."""
        piece, start = STAGING_BYTES // 2 // out.itemsize, 0
        staging = np.frombuffer(self._staging, out.dtype, 2 * piece).reshape(2, piece)
        copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        for turn, values in enumerate(self._pieces(tensor, piece)):
            half, end = turn % 2, start + values.size
            copied[half].synchronize()
            staging[half, : values.size] = values.view(out.dtype)
            out[start:end].set(staging[half, : values.size], stream=self._stream)
            copied[half].record(self._stream)
            start = end
            tensor.release()
        self._stream.synchronize()
        tensor.release()

    def _pieces(self, tensor: Any, size: int) -> Iterator[np.ndarray]:
        """A matrix as it is held, one after the other at most so many numbers."""
        if tensor.dtype == self._format.name:
            source = tensor.array().reshape(-1)
            for start in range(0, source.size, size):
                yield source[start : start + size]
        else:
            for rows in float32_rows(tensor, size):
                yield narrow(rows, self._format).reshape(-1)

"""Where the pages of a KV cache lie on the device."""

from __future__ import annotations

import itertools
import math
from typing import Any

import cupy
import numpy as np

from losart.backends.cuda.memory import DeviceMemory
from losart.config.model import ModelConfig
from losart.config.precision import GROUP_PAGES, Format, Precision
from losart.engine.kv_cache import HostArrays

NUMBERS = itertools.count()  # of page tables


class DeviceArrays(HostArrays):
    """What is done with the arrays of chunks beside passes, in the device's memory.

    Parameters
    ----------
    memory : DeviceMemory
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory

    def copy(self, to: Any, at: int, source: Any, start: int, axis: int, count: int) -> None:
        rows = math.prod(source.shape[:axis])
        to_pitch, source_pitch = to.nbytes // rows, source.nbytes // rows
        size = source_pitch // source.shape[axis]  # of one along the axis
        runtime = cupy.cuda.runtime
        with self._memory.running("the KV cache"):
            runtime.memcpy2DAsync(
                *(to.data.ptr + at * size, to_pitch, source.data.ptr + start * size, source_pitch),
                *(count * size, rows, runtime.memcpyDeviceToDevice, self._memory.stream.ptr),
            )

    def to_host(self, array: Any) -> np.ndarray:
        with self._memory.running("the KV cache"):
            return array.get(stream=self._memory.stream)

    def from_host(self, values: np.ndarray, shape: tuple[int, ...], format: Format) -> Any:
        with self._memory.running("the KV cache"):
            array = cupy.empty(shape, format.bits_array)
            array.set(values.view(format.bits_array).reshape(shape), stream=self._memory.stream)
            return array


class CudaPageTable:
    """Chunks of pages in device memory.

        kv chunk      [layers, 2 (keys, values), kv_heads, positions, head_dim and bytes of a scale]
        bounds chunk  [layers, kv_heads, pages of the chunk / 16, values]

    A page of one kv head is contiguous. The order of its values is in kernels_cu/cache/layout.cuh, that of
    what bounds 16 pages in kernels_cu/cache/pages.cuh.

    Parameters
    ----------
    config : ModelConfig
    page_size, positions_per_chunk : int
    precision : Precision

    Attributes
    ----------
    kv_heads, head_dim : int
    max_chunks : int
    addresses : uint64 [2, max_chunks]
        Of the chunks, of which `placed` are there.
    number : int
        No other table's.
    placed : int
    """

    def __init__(
        self, config: ModelConfig, page_size: int, positions_per_chunk: int, precision: Precision
    ) -> None:
        self.page_size = page_size
        self.positions_per_chunk = positions_per_chunk
        self.kv_format, self.bounds_format = precision.kv, precision.kv_operands
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
        values = dim + self.kv_format.scale_bytes // self.kv_format.itemsize
        self.kv_shape = (layers, 2, heads, positions_per_chunk, values)
        # Exact bounds, a base and a step per channel, and two codes of 4 bits.
        coded = 2 * dim + GROUP_PAGES * dim // self.bounds_format.itemsize
        groups = positions_per_chunk // (page_size * GROUP_PAGES)
        self.bounds_shape = (layers, heads, groups, 2 * GROUP_PAGES * dim + coded)
        self.chunks: list[tuple[Any, Any]] = []
        self.max_positions = config.max_positions
        # The last block may reach beyond the positions, by less than the largest block.
        self.max_chunks = -(-2 * config.max_positions // positions_per_chunk) + 2
        self.addresses = cupy.zeros((2, self.max_chunks), np.uint64)
        self.number = next(NUMBERS)
        self.placed = 0
        self._address = int(self.addresses.data.ptr)

    @property
    def capacity(self) -> int:
        """Positions that the chunks hold."""
        return len(self.chunks) * self.positions_per_chunk

    def add_chunk(self, kv: Any, bounds: Any) -> None:
        """Take two arrays of `kv_shape` and `bounds_shape` as the next chunk."""
        self.chunks.append((kv, bounds))

    def place(self, stream: Any) -> int:
        """Where kernels find the addresses of the chunks: of keys and values, and of bounds."""
        if self.placed < len(self.chunks):
            for row, added in zip(self.addresses, zip(*self.chunks[self.placed :], strict=True), strict=True):
                pointers = np.array([chunk.data.ptr for chunk in added], np.uint64)
                row[self.placed : len(self.chunks)].set(pointers, stream=stream)
            self.placed = len(self.chunks)
        return self._address

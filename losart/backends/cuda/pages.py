"""Where the pages of a KV cache lie on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from losart.config.model import ModelConfig
from losart.config.precision import GROUP_PAGES, Format
from losart.engine.kv_cache import SMALL_CHUNK_POSITIONS


class CudaPageTable:
    """Chunks of pages in device memory.

        kv chunk      [layers, 2 (keys, values), kv_heads, positions of the chunk, head_dim]
        bounds chunk  [layers, kv_heads, pages of the chunk / 16, values]

    A page of one kv head is contiguous. The order of its values, and of those that bound 16 pages, is in
    kernels_cu/cache/layout.cuh.

    Parameters
    ----------
    config : ModelConfig
    page_size, positions_per_chunk : int
    format : Format
        Of keys, values and bounds.
    """

    def __init__(self, config: ModelConfig, page_size: int, positions_per_chunk: int, format: Format) -> None:
        self.page_size = page_size
        self.positions_per_chunk = positions_per_chunk
        self.kv_format = self.bounds_format = format
        layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.kv_shape = (layers, 2, heads, positions_per_chunk, dim)
        # Exact bounds, a base and a step per channel, and two codes of 4 bits.
        coded = 2 * dim + GROUP_PAGES * dim // format.itemsize
        groups = positions_per_chunk // (page_size * GROUP_PAGES)
        self.bounds_shape = (layers, heads, groups, 2 * GROUP_PAGES * dim + coded)
        self.chunks: list[tuple[Any, Any]] = []

    @property
    def capacity(self) -> int:
        """Positions that the chunks hold."""
        return len(self.chunks) * self.positions_per_chunk

    def add_chunk(self, kv: Any, bounds: Any) -> None:
        """Take two arrays of `kv_shape` and `bounds_shape` as the next chunk."""
        self.chunks.append((kv, bounds))


class PagesInPlace:
    """Where kernels look for the chunks of the cache that a pass works on.

    Parameters
    ----------
    max_positions : int

    Attributes
    ----------
    max_positions : int
    kv, bounds : uint64 [chunks], on the device
        Addresses of the chunks of keys and values, and of bounds.
    """

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        # The last block may reach beyond the positions, by less than the largest block.
        chunks = -(-2 * max_positions // SMALL_CHUNK_POSITIONS) + 2
        self.kv, self.bounds = (cupy.zeros(chunks, np.uint64) for _ in range(2))
        self._table: Callable[[], CudaPageTable | None] = lambda: None
        self._count = 0

    def place(self, table: CudaPageTable, stream: Any) -> None:
        """Write a table's addresses, unless they are in place already."""
        if self._table() is table and self._count == len(table.chunks):
            return
        self._table = lambda: None  # an interrupt leaves none in place
        for addresses, chunks in zip((self.kv, self.bounds), zip(*table.chunks, strict=True), strict=True):
            pointers = np.array([chunk.data.ptr for chunk in chunks], np.uint64)
            addresses[: len(pointers)].set(pointers, stream=stream)
        self._table, self._count = weakref.ref(table), len(table.chunks)

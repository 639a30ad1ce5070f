"""A pass on the device: what host and device exchange about it, and what operations get as `batch`."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from losart.backends.cuda.pages import CudaPageTable, PagesInPlace
from losart.backends.cuda.slots import Slot
from losart.config.options import GenerationConfig
from losart.engine.batch import PassKind, SequencePass
from losart.kernels_cu.views import BatchView, CacheView, StoredView


class BatchBuffers:
    """A pass's inputs and results in device memory that stays in place, so that a graph can be replayed.

    Attributes
    ----------
    tokens : int
    masked : int32 [tokens]
        Masked rows, as many as `masked_count` says.
    masked_count, length : int32 [1]
        `length`: of the prefix.
    reads : int32 [2]
        By sparse attention in this pass: positions, and tokens that read them, summed over layers.
    results : int32 [4, tokens]
        Of sampling.
    view : BatchView
    cache_views : dict
        Views of layers of caches whose lengths lie here.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        words = cupy.zeros(8 * tokens + 6, np.int32)
        # Reads are written from both sides: zeroed by the host, counted by the device.
        self._from_host, self._to_host = words[: 4 * tokens + 6], words[4 * tokens + 4 :]
        slot, uniforms, self.length, self.masked_count, ids, self.masked, self.reads = _fields(
            self._from_host, tokens
        )
        self.results = self._to_host[2:].reshape(4, tokens)
        pointers = (uniforms, slot, self.length, self.masked_count, ids, self.masked, self.reads)
        self.view = BatchView(*(array.data.ptr for array in pointers), tokens)
        self.cache_views: dict[tuple[int, int, int], CacheView] = {}
        self._words = np.zeros(self._from_host.shape, np.int32)
        self._host = _fields(self._words, tokens)

    def fill(self, sequence: SequencePass, stream: Any) -> None:
        """Copy a pass's inputs to the device, all at once."""
        slot, uniforms, length, masked_count, ids, masked, _ = self._host
        slot[0] = 0 if sequence.slot is None else sequence.slot.memory.data.ptr
        uniforms[: len(sequence.uniforms)] = sequence.uniforms
        length[0], masked_count[0], ids[:] = sequence.prefix_length, len(sequence.masked), sequence.ids
        masked[: len(sequence.masked)] = sequence.masked
        self._from_host.set(self._words, stream=stream)  # has read pageable memory when it returns

    def fetch(self) -> tuple[int, int, np.ndarray]:
        """Positions and tokens read, and results, when the current stream has reached this point."""
        words = self._to_host.get()
        return int(words[0]), int(words[1]), words[2:].reshape(self.results.shape)


def _fields(words: Any, tokens: int) -> tuple[Any, ...]:
    """Slot, uniforms, length, number of masked rows, ids, masked rows and reads."""
    wide, rest = words[: 2 + 2 * tokens], words[2 + 2 * tokens :]
    slot, uniforms = wide[:2].view(np.uint64), wide[2:].view(np.float64)
    return slot, uniforms, rest[:1], rest[1:2], rest[2 : 2 + tokens], rest[2 + tokens : -2], rest[-2:]


class DeviceBatch:
    """One pass, as the backend's operations get it.

    Parameters
    ----------
    sequence : SequencePass
    buffers : BatchBuffers
    pages : PagesInPlace

    Attributes
    ----------
    sequence : SequencePass
        The host's side, of this pass alone: what is launched by it must not be captured.
    kind : PassKind
    options : GenerationConfig
    tokens, page_size, chunk_positions : int
    """

    def __init__(self, sequence: SequencePass, buffers: BatchBuffers, pages: PagesInPlace) -> None:
        table = sequence.cache.table
        self.sequence = sequence
        self.buffers = buffers
        self.kind: PassKind = sequence.kind
        self.options: GenerationConfig = sequence.options
        self.tokens = buffers.tokens
        self.page_size: int = table.page_size
        self.chunk_positions: int = table.positions_per_chunk
        self.view = buffers.view
        self._table: CudaPageTable = table
        self._pages = pages

    @property
    def max_pages(self) -> int:
        """Pages of the longest prefix that a pass can have: its block begins within the positions."""
        return -(-self._pages.max_positions // self.page_size)

    @property
    def mark_words(self) -> int:
        """Words of 32 bits that have a bit for each of those pages."""
        return -(-self.max_pages // 32)

    @property
    def denoises(self) -> bool:
        """Whether some rows are proposed tokens for."""
        return self.kind.denoises

    def parts(self) -> list[tuple[DeviceBatch, slice]]:
        """It has one kind of pass."""
        return [(self, slice(self.tokens))]

    @property
    def slot(self) -> Slot:
        """The sequence's stored results."""
        return self.sequence.slot

    def cache_view(self, layer: int) -> CacheView:
        """A layer of the sequence's cache."""
        views, key = self.buffers.cache_views, (layer, self.chunk_positions, self.page_size)
        if key not in views:
            addresses = self._pages.kv.data.ptr, self._pages.bounds.data.ptr, self.view.length
            _, _, kv_heads, _, head_dim = self._table.kv_shape
            views[key] = CacheView(*addresses, layer, kv_heads, head_dim, *key[1:])
        return views[key]

    def stored(self, name: str, layer: int) -> StoredView:
        """A layer of an array in the sequence's slot."""
        return StoredView(self.view.slot, self.slot.offset(name, layer))

    @property
    def stored_pages_shape(self) -> tuple[int, int, int]:
        """kv heads, rows and count of the top pages in a layer of the slot: no more than there can be."""
        stored = self.slot.stored
        return self._table.kv_shape[2], stored.top_pages_rows, min(stored.top_pages, self.max_pages)

"""A pass on the device: what host and device exchange about it, and what operations get as `batch`."""

from __future__ import annotations

import itertools
from typing import Any

import cupy
import numpy as np

from losart.backends.cuda.pages import CudaPageTable, PagesInPlace
from losart.backends.cuda.slots import Slot
from losart.config.options import GenerationConfig
from losart.engine.batch import PassBatch, PassKind
from losart.kernels_cu.views import BatchView, CacheView, StoredView


class BatchBuffers:
    """A pass's inputs and results in device memory that stays in place, so that a graph can be replayed.

    Parameters
    ----------
    sequences, tokens : int
        Sequences, and rows of each.

    Attributes
    ----------
    length : int32 [sequences]
        Of the prefixes.
    masked : int32 [tokens]
        Masked rows of the last sequence, as many as `masked_count` says.
    masked_count : int32 [1]
    reads : int32 [2]
        By sparse attention in this pass: positions, and tokens that read them, summed over layers.
    results : int32 [4, tokens]
        Of sampling, for the last sequence.
    view : BatchView
    cache_views : dict
        Views of layers of caches whose lengths lie here.
    """

    def __init__(self, sequences: int, tokens: int) -> None:
        rows = sequences * tokens
        sizes = 2 * sequences, 2 * tokens, sequences, 1, rows, tokens, 2
        words = cupy.zeros(sum(sizes) + 4 * tokens, np.int32)
        # Reads are written from both sides: zeroed by the host, counted by the device.
        self._from_host, self._to_host = words[: sum(sizes)], words[sum(sizes) - 2 :]
        slot, uniforms, self.length, self.masked_count, ids, self.masked, self.reads = _fields(
            self._from_host, sizes
        )
        self.results = self._to_host[2:].reshape(4, tokens)
        pointers = (uniforms, slot, self.length, self.masked_count, ids, self.masked, self.reads)
        self.view = BatchView(*(array.data.ptr for array in pointers), rows, tokens)
        self.cache_views: dict[tuple[int, int, int], CacheView] = {}
        self._words = np.zeros(self._from_host.shape, np.int32)
        self._host = _fields(self._words, sizes)

    def fill(self, batch: PassBatch, stream: Any) -> None:
        """Copy a pass's inputs to the device, all at once."""
        slot, uniforms, length, masked_count, ids, masked, _ = self._host
        for index, (sequence, rows) in enumerate(batch.rows()):
            slot[index] = 0 if sequence.slot is None else sequence.slot.memory.data.ptr
            length[index], ids[rows] = sequence.prefix_length, sequence.ids
        last = batch.sequences[-1]
        uniforms[: len(last.uniforms)] = last.uniforms
        masked_count[0] = len(last.masked)
        masked[: len(last.masked)] = last.masked
        self._from_host.set(self._words, stream=stream)  # has read pageable memory when it returns

    def fetch(self) -> tuple[int, int, np.ndarray]:
        """Positions and tokens read, and results, when the current stream has reached this point."""
        words = self._to_host.get()
        return int(words[0]), int(words[1]), words[2:].reshape(self.results.shape)


def _fields(words: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Slots, uniforms, lengths, number of masked rows, ids, masked rows and reads."""
    ends = list(itertools.accumulate(sizes))
    slots, uniforms, *rest = (words[end - size : end] for size, end in zip(sizes, ends, strict=True))
    return [slots.view(np.uint64), uniforms.view(np.float64), *rest]


class DeviceBatch:
    """One pass, as the backend's operations get it.

    Parameters
    ----------
    batch : PassBatch
        One sequence, or a commit and the first pass over the next block.
    buffers : BatchBuffers
    pages : PagesInPlace

    Attributes
    ----------
    sequence : SequencePass
        The last one, the host's side, of this pass alone: what is launched by it must not be captured.
    kind : PassKind
    rides : bool
    options : GenerationConfig
    sequences, tokens, sequence_tokens, page_size, chunk_positions : int
        `tokens`: rows in all; `sequence_tokens`: of each sequence.
    """

    def __init__(self, batch: PassBatch, buffers: BatchBuffers, pages: PagesInPlace) -> None:
        self.sequence = batch.sequences[-1]
        table = self.sequence.cache.table
        self.buffers = buffers
        self.kind: PassKind = batch.kind
        self.rides: bool = batch.rides
        self.options: GenerationConfig = batch.options
        self.sequences, self.tokens = len(batch.sequences), batch.tokens
        self.sequence_tokens = len(self.sequence.ids)
        self.page_size: int = table.page_size
        self.chunk_positions: int = table.positions_per_chunk
        self.view = buffers.view
        self._table: CudaPageTable = table
        self._pages = pages

    @property
    def denoises(self) -> bool:
        """Whether the pass proposes tokens."""
        return self.kind.denoises

    def groups(self) -> list[tuple[DeviceBatch, slice]]:
        """All rows: as of PassBatch."""
        return [(self, slice(0, self.tokens))]

    @property
    def max_pages(self) -> int:
        """Pages of the longest prefix that a pass can have: its block begins within the positions."""
        return -(-self._pages.max_positions // self.page_size)

    @property
    def mark_words(self) -> int:
        """Words of 32 bits that have a bit for each of those pages."""
        return -(-self.max_pages // 32)

    @property
    def slot(self) -> Slot:
        """The sequence's stored results."""
        return self.sequence.slot

    def cache_view(self, layer: int) -> CacheView:
        """A layer of the cache."""
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

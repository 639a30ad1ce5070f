"""Selection of tokens and pages on the host, for the CUDA backend.

The device ranks: it measures the change of queries and finds the top pages of every query of the block.
The host does what the CPU backend does with that, in Cython: it takes the active tokens, and unites their
pages per kv head. One transfer each way a layer, and the device waits in between; a pass cannot be
captured. The same is selected as on the device, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from losart.backends.cpu.active_set import select_active
from losart.backends.cpu.kv_index import mark_pages
from losart.backends.cuda.results import NO_PAGES, ChosenPages
from losart.engine.kv_cache import PagedKVCache


@dataclass
class PendingActive:
    """Active tokens that the host selects when it selects their pages.

    Attributes
    ----------
    change : float32 [tokens], on the device
    count : int
    candidates : int32 [any], optional
        On the host.
    tokens : int32 [count], on the device
        -1 after the last; there when the pages are.
    """

    change: Any
    count: int
    candidates: np.ndarray | None
    tokens: Any

    def __len__(self) -> int:
        return self.count

    def select(self, change: np.ndarray) -> np.ndarray:
        """The tokens by their changes."""
        if self.candidates is None:
            return select_active(change, self.count)
        of_candidates = np.ascontiguousarray(change[self.candidates])
        return self.candidates[select_active(of_candidates, min(self.count, len(self.candidates)))]


class HostPlanner:
    """A CUDA backend whose tokens and pages are selected on the host; all else is the backend's.

    Parameters
    ----------
    backend : CudaBackend
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def select_active(
        self, q: Any, previous: Any, count: int, candidates: np.ndarray | None = None, keep: bool = False
    ) -> PendingActive:
        self._backend.captures = False
        change = self._backend.query_change(q, previous, keep)
        return PendingActive(change, count, candidates, cupy.empty(count, np.int32))

    def select_pages(
        self, q: Any, tokens: PendingActive | None, cache: PagedKVCache, layer: int, count: int
    ) -> ChosenPages:
        if tokens is not None and not tokens.count:
            return NO_PAGES
        return self._unite(self._backend.top_pages(q, cache, layer, count), tokens, cache)

    def select_pages_by_mass(
        self, masses: Any, tokens: PendingActive | None, cache: PagedKVCache, count: int
    ) -> ChosenPages:
        if tokens is not None and not tokens.count:
            return NO_PAGES
        return self._unite(masses, tokens, cache)

    def _unite(self, selected: Any, tokens: PendingActive | None, cache: PagedKVCache) -> ChosenPages:
        """Pages that rows have selected, [kv_heads, rows, count], united for some tokens or all."""
        backend, group = self._backend, self._backend.config.group_size
        backend.captures = False
        kv_heads, rows, count = selected.shape
        words = backend.mark_words(cache.page_size)
        if tokens is None:
            marks = mark_pages(selected.get(), None, group, words)
            return ChosenPages(min(32 * words, rows * count), marks=cupy.asarray(marks))
        both = cupy.concatenate([tokens.change.view(np.int32), selected.ravel()]).get()
        changes, ids = both[: len(tokens.change)].view(np.float32), both[len(tokens.change) :]
        active = tokens.select(changes)
        marks = mark_pages(ids.reshape(selected.shape), active, group, words)
        padded = np.full(tokens.count, -1, np.int32)
        padded[: len(active)] = active
        there = cupy.asarray(np.concatenate([padded, marks.view(np.int32).ravel()]))
        tokens.tokens = there[: tokens.count]
        marks_there = there[tokens.count :].view(np.uint32).reshape(kv_heads, words)
        return ChosenPages(min(32 * words, tokens.count * group * count), marks=marks_there)

    def sparse_prefix_attention(
        self,
        q: Any,
        tokens: PendingActive | None,
        pages: ChosenPages,
        cache: PagedKVCache,
        layer: int,
        into: tuple[Any, Any] | None = None,
    ) -> Any:
        return self._backend.sparse_prefix_attention(q, _there(tokens), pages, cache, layer, into)

    def copy_tokens(self, source: Any, tokens: PendingActive | None, into: Any) -> None:
        self._backend.copy_tokens(source, _there(tokens), into)

    def to_host(self, array: Any) -> np.ndarray:
        return self._backend.to_host(_there(array))


def _there(tokens: Any) -> Any:
    return tokens.tokens if isinstance(tokens, PendingActive) else tokens

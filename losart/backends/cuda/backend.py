"""The CUDA backend: on top of dense attention, what the sparse policies of losart.attention ask for.

All of it happens in the pass's CUDA graph. Nothing is selected on the host, so that a captured pass can be
replayed: lists of tokens and pages have room for the most that there can be, and what there is is read from
device memory. With `planner="host"` it is otherwise: cuda_host_planner.py.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from typing import Any

import cupy
import numpy as np

from losart.backends.base import Memory
from losart.backends.cuda.dense import DenseCudaBackend
from losart.backends.cuda.graph import outside_passes
from losart.backends.cuda.host_planner import HostPlanner
from losart.backends.cuda.plans import masses_plan, scores_plan, sparse_plan, top_pages_plan
from losart.backends.cuda.results import NO_PAGES, ChosenPages, PrefixParts, RefreshedPrefix
from losart.config.model import ModelConfig
from losart.engine.kv_cache import PagedKVCache

UNIT = 16  # positions of a mass; page_masses.cu
FREE_MEMORIES = 4  # kept for generations to come


class CudaBackend(DenseCudaBackend):
    """Implements `losart.backends.base.SparseBackend`.

    Lists of tokens are int32 [count] on the device; places after the last token hold -1.

    Parameters
    ----------
    config : ModelConfig
    dtype : {"float32", "bfloat16", "float16"}
        In which weights, keys and values are held.
    """

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        super().__init__(config, dtype)
        self._memory_keys = itertools.count()
        self._free: list[tuple[Hashable, Hashable, dict[Hashable, Any]]] = []
        with self.stream:
            self._done = cupy.zeros(1, np.uint32)  # 0 between kernels

    def most_pages(self, page_size: int) -> int:
        """Pages of the longest prefix that a pass can have: its block begins within the positions."""
        return -(-self.config.max_positions // page_size)

    def mark_words(self, page_size: int) -> int:
        """Words that have a bit for each of those pages."""
        return -(-self.most_pages(page_size) // 32)

    def planned(self, planner: str) -> Any:
        """The backend as a policy with this option talks to it."""
        return HostPlanner(self) if planner == "host" else self

    # -- between passes

    def new_memory(self, purpose: Hashable) -> Memory:
        with self._lock:
            free = next((entry for entry in self._free if entry[0] == purpose), None)
            if free is not None:
                self._free.remove(free)
        memory = Memory(next(self._memory_keys)) if free is None else Memory(*free[1:])
        weakref.finalize(memory, self._take_back, purpose, memory.key, memory.arrays).atexit = False
        return memory

    def _take_back(self, purpose: Hashable, key: Hashable, arrays: dict[Hashable, Any]) -> None:
        """A memory that no generation has any more, for the next one."""
        with self._lock:
            self._free.append((purpose, key, arrays))
            # With one that is dropped its key is lost: what was captured with it is never replayed.
            del self._free[:-FREE_MEMORIES]

    def _array(self, memory: Memory, name: Hashable, shape: tuple[int, ...], dtype: Any) -> Any:
        if name not in memory.arrays:
            with outside_passes():
                memory.arrays[name] = cupy.empty(shape, dtype)
        return memory.arrays[name]

    def keep(self, memory: Memory, name: Hashable, array: Any) -> None:
        self.copy_tokens(array, None, self._array(memory, name, array.shape, array.dtype))

    def keep_prefix(self, memory: Memory, name: Hashable, prefix: Any) -> None:
        parts = self.as_parts(prefix)
        if name not in memory.arrays:
            with outside_passes():
                memory.arrays[name] = self._new_result(parts)
        self._merge(parts, None, memory.arrays[name])

    def keep_masses(
        self, memory: Memory, name: Hashable, masses: Any, cache: PagedKVCache, count: int, summed: bool
    ) -> None:
        kv_heads, tokens, group, _ = masses.shape
        rows, sums = (group, tokens) if summed else (tokens * group, 1)
        count = min(count, self.most_pages(cache.page_size))
        ids = self._array(memory, name, (kv_heads, rows, count), np.int32)
        self._top_pages(masses, sums, cache.page_size // UNIT, cache, ids)

    def copy_tokens(self, source: Any, tokens: Any, into: Any) -> None:
        count = len(source) if tokens is None else len(tokens)
        if count:
            self._launch("copy_tokens", (count,), 256, source, tokens, into, source[0].size)

    # -- selection

    def select_active(
        self,
        q: Any,
        previous: Any,
        count: int,
        candidates: np.ndarray | None = None,
        keep: bool = False,
    ) -> Any:
        active = cupy.empty(count, np.int32)
        masked = (None, None) if candidates is None else (self._given.rows, self._given.count)
        # With a count of 0 too: the kernel that follows relies on one that waits (common.cuh).
        self.query_change(q, previous, keep, masked, active)
        return active

    def query_change(
        self, q: Any, previous: Any, keep: bool, masked: tuple[Any, Any] = (None, None), active: Any = None
    ) -> Any:
        """Change of each token's query [tokens]; with a list `active`, the tokens that changed most."""
        change, count = cupy.empty(len(q), np.float32), 0 if active is None else len(active)
        arguments = (q, previous, q[0].size, int(keep), *masked, change, self._done, active, count)
        self._launch("query_change", (len(q),), 256, *arguments)
        return change

    def select_pages(self, q: Any, tokens: Any, cache: PagedKVCache, layer: int, count: int) -> ChosenPages:
        c, token_count = self.config, len(q) if tokens is None else len(tokens)
        rows, pages = token_count * c.group_size, self.most_pages(cache.page_size)
        if not rows:
            return NO_PAGES
        count, words = min(count, pages), self.mark_words(cache.page_size)
        marks = cupy.empty((c.num_kv_heads, words), np.uint32)
        scores = self._page_scores(q, tokens, rows, cache, layer, marks)
        self._launch_plan(
            top_pages_plan("mark_pages", rows, c.num_kv_heads, pages),
            *(scores, pages, self._given.length, cache.page_size, tokens, c.group_size, count, marks, words),
        )
        return ChosenPages(min(pages, rows * count), marks=marks)

    def top_pages(self, q: Any, cache: PagedKVCache, layer: int, count: int) -> Any:
        """Top `count` pages of each query by QUEST's bound: [kv_heads, rows, count], -1 for none."""
        c, rows = self.config, len(q) * self.config.group_size
        count = min(count, self.most_pages(cache.page_size))
        scores = self._page_scores(q, None, rows, cache, layer, cupy.empty((c.num_kv_heads, 0), np.uint32))
        ids = cupy.empty((c.num_kv_heads, rows, count), np.int32)
        self._top_pages(scores, 1, 1, cache, ids)
        return ids

    def _page_scores(
        self, q: Any, tokens: Any, rows: int, cache: PagedKVCache, layer: int, marks: Any
    ) -> Any:
        """QUEST's bounds [kv_heads, rows, pages] for some tokens' queries; marks become 0."""
        c, table = self.config, cache.table
        scores = cupy.empty((c.num_kv_heads, rows, self.most_pages(cache.page_size)), np.float32)
        bounds = (self._pages.bounds, self._given.length, layer, c.num_kv_heads)
        sizes = (cache.page_size, table.positions_per_chunk, c.head_dim)
        self._launch_plan(
            scores_plan(self.card, self._tensor, rows, c.num_kv_heads, c.head_dim),
            *(q, tokens, rows, c.num_heads, *bounds, *sizes, scores, scores.shape[2], marks, marks.shape[1]),
        )
        return scores

    def _top_pages(self, scores: Any, sums: int, units: int, cache: PagedKVCache, ids: Any) -> None:
        kv_heads, rows, count = ids.shape
        self._launch_plan(
            top_pages_plan("top_pages", rows, kv_heads, self.most_pages(cache.page_size)),
            *(scores, sums, units, scores.shape[-1], self._given.length, cache.page_size, count, ids),
        )

    def select_pages_by_mass(self, masses: Any, tokens: Any, cache: PagedKVCache, count: int) -> ChosenPages:
        group, (_, rows, count) = self.config.group_size, masses.shape
        if tokens is not None:
            rows = len(tokens) * group
        if not rows:
            return NO_PAGES
        most = min(self.most_pages(cache.page_size), rows * count)
        return ChosenPages(most, selected=masses, tokens=tokens, group=group)

    def page_lists(self, pages: ChosenPages) -> list[np.ndarray]:
        if not pages.most:
            return [np.empty(0, np.int64)] * self.config.num_kv_heads
        return pages.on_host(self.stream)

    # -- attention

    def prefix_attention_and_masses(self, q: Any, cache: PagedKVCache, layer: int) -> tuple[Any, Any]:
        c, tokens = self.config, len(q)
        o, lse = self.merge(self.prefix_attention(q, cache, layer))
        units = self.most_pages(UNIT) + cache.page_size // UNIT
        masses = cupy.empty((c.num_kv_heads, tokens, c.group_size, units), np.float32)
        plan = masses_plan(self.card, self._tensor, *self._shape(q))
        arguments = self._cache_arguments(cache.table, layer)
        self._launch_plan(plan, q, lse, *arguments, masses, units, tokens, c.num_heads)
        return (o, lse), masses

    def sparse_prefix_attention(
        self,
        q: Any,
        tokens: Any,
        pages: ChosenPages,
        cache: PagedKVCache,
        layer: int,
        into: tuple[Any, Any] | None = None,
    ) -> Any:
        c, count = self.config, len(q) if tokens is None else len(tokens)
        if not count:
            return into
        shape = (count, c.num_heads, c.num_kv_heads, c.head_dim)
        words = 0 if pages.selected is None else self.mark_words(cache.page_size)
        plan = sparse_plan(self.card, self._tensor, *shape, pages.most, cache.page_size, words)
        parts = PrefixParts.empty(plan.parts, count, c.num_heads, c.head_dim)
        self._launch_plan(
            plan,
            *(q, tokens, *self._cache_arguments(cache.table, layer)),
            *(*pages.arguments, cache.page_size, self._given.positions, plan.capacity),
            *(parts.o, parts.tops, parts.totals, count, c.num_heads),
        )
        self.counted = True
        return parts if into is None else RefreshedPrefix(parts, tokens, into)

    def to_host(self, array: Any) -> np.ndarray:
        return array.get(stream=self.stream)

"""Selection of active tokens and of pages on the device."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from losart.backends.base import ActiveRule, ActiveTokens, Selection
from losart.backends.cuda.batch import DeviceBatch
from losart.backends.cuda.kernels import Kernels
from losart.backends.cuda.plans import scores_plan
from losart.backends.cuda.results import NO_PAGES, NOTHING_STORED, SelectedPages
from losart.config.model import ModelConfig
from losart.kernels_cu.constants import QUERY_CHANGE_THREADS, TOP_PAGES_THREADS
from losart.kernels_cu.views import StoredView


class DeviceSelector:
    """Implements `losart.backends.base.Selector`.

    The host learns nothing of what is selected, so that a captured pass can be replayed: lists have room for
    the most that there can be. Active tokens are int32 [count of the rule]; -1 follows the last.

    Parameters
    ----------
    config : ModelConfig
    kernels : Kernels
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        self._config = config
        self._kernels = kernels
        self._done = cupy.zeros(1, np.uint32)  # query_change's counter, 0 between launches

    def select_active(self, layer: int, q: Any, batch: DeviceBatch, rule: ActiveRule) -> ActiveTokens:
        # With a count of 0 too: the next kernel relies on one that waits (kernels_cu/common/overlap.cuh).
        tokens = cupy.empty(rule.count, np.int32)
        return ActiveTokens(tokens, self.query_change(layer, q, batch, rule, tokens))

    def select_pages(
        self, layer: int, q: Any, active: ActiveTokens | None, batch: DeviceBatch, count: int
    ) -> Selection:
        tokens, change = (None, None) if active is None else (active.tokens, active.change)
        c, rows = self._config, (len(q) if tokens is None else len(tokens)) * self._config.group_size
        if not rows:
            return Selection(tokens, NO_PAGES, change)
        pages, words, count = batch.max_pages, batch.mark_words, min(count, batch.max_pages)
        marks = cupy.empty((c.num_kv_heads, words), np.uint32)
        scores = self._page_scores(layer, q, tokens, batch, marks)
        self._kernels.launch(
            "mark_pages",
            (c.num_kv_heads, rows),
            TOP_PAGES_THREADS,
            *(scores, pages, batch.cache_view(layer), tokens, c.group_size, count, marks, words),
        )
        return Selection(tokens, SelectedPages(min(pages, rows * count), marks), change)

    def select_stored_pages(self, layer: int, active: ActiveTokens | None, batch: DeviceBatch) -> Selection:
        tokens, change = (None, None) if active is None else (active.tokens, active.change)
        _, rows, count = batch.stored_pages_shape
        reading = rows if tokens is None else len(tokens) * self._config.group_size
        if not reading:
            return Selection(tokens, NO_PAGES, change)
        limit, top = min(batch.max_pages, reading * count), batch.stored("top_pages", layer)
        return Selection(tokens, SelectedPages(limit, top=top, rows=rows, count=count), change)

    def query_change(self, layer: int, q: Any, batch: DeviceBatch, rule: ActiveRule, active: Any) -> Any:
        """Change of each token's query, float32 [tokens]; the list `active` gets the active ones."""
        change, stored = cupy.empty(len(q), np.float32), batch.stored("queries", layer)
        relative = rule.threshold is not None
        masked = (batch.buffers.masked, batch.buffers.masked_count) if rule.masked_only else (None, None)
        self._kernels.launch(
            "query_change",
            (len(q),),
            QUERY_CHANGE_THREADS,
            *(q, stored, q[0].size, int(relative), int(rule.follow), *masked),
            *(rule.threshold if relative else -1.0, change, self._done, active, len(active)),
        )
        return change

    def top_pages(self, layer: int, q: Any, batch: DeviceBatch, count: int) -> Any:
        """Top `count` pages of each query by QUEST's bound: int32 [kv_heads, rows, count], -1 for none."""
        marks = cupy.empty((self._config.num_kv_heads, 0), np.uint32)
        scores = self._page_scores(layer, q, None, batch, marks)
        ids = cupy.empty((*scores.shape[:2], min(count, batch.max_pages)), np.int32)
        self.rank(layer, scores, batch, ids.shape[2], ids=ids)
        return ids

    def rank(
        self,
        layer: int,
        scores: Any,
        batch: DeviceBatch,
        count: int,
        *,
        sums: int = 1,
        units: int = 1,
        stored: StoredView = NOTHING_STORED,
        ids: Any | None = None,
    ) -> None:
        """The `count` pages of highest score of each row, into `ids` or the slot.

        scores [kv_heads, sums, rows, any]: a page's is summed over `sums`, and over its `units` values.
        """
        kv_heads, rows, stride = scores.shape[0], scores.shape[-2], scores.shape[-1]
        self._kernels.launch(
            "top_pages",
            (kv_heads, rows),
            TOP_PAGES_THREADS,
            *(scores, sums, units, stride, batch.cache_view(layer), count, stored, ids),
        )

    def _page_scores(self, layer: int, q: Any, tokens: Any | None, batch: DeviceBatch, marks: Any) -> Any:
        """QUEST's bounds [kv_heads, rows, pages] for the queries of some tokens (None: all); zeroes marks."""
        c, kernels, pages = self._config, self._kernels, batch.max_pages
        rows = (len(q) if tokens is None else len(tokens)) * c.group_size
        scores = cupy.empty((c.num_kv_heads, rows, pages), np.float32)
        kernels.launch_plan(
            scores_plan(kernels.card, kernels.tensor_attention, rows, c.num_kv_heads, c.head_dim),
            *(q, tokens, rows, c.num_heads, batch.cache_view(layer), scores, pages, marks, marks.shape[1]),
        )
        return scores

"""Selection of active tokens and of pages on the device."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from losart.backends.base import ActiveRule, ActiveTokens, Selection
from losart.backends.cuda.batch import DeviceBatch
from losart.backends.cuda.kernels import Kernels
from losart.backends.cuda.plans import divided_blocks, scores_plan
from losart.backends.cuda.results import NO_PAGES, NOTHING_STORED, SelectedPages
from losart.config.model import ModelConfig
from losart.kernels_cu.constants import QUERY_CHANGE_THREADS, TOP_PAGES_THREADS
from losart.kernels_cu.views import StoredView

MOST_SEQUENCES = 1024  # of a group


class DeviceSelector:
    """Implements `losart.backends.base.Selector`.

    The host learns nothing of what is selected, so that a captured pass can be replayed: lists have room for
    the most that there can be. Active tokens are int32 [sequences, count of the rule]; -1 follows the last.

    Parameters
    ----------
    config : ModelConfig
    kernels : Kernels
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        self._config = config
        self._kernels = kernels
        self._done = cupy.zeros(MOST_SEQUENCES, np.uint32)  # query_change's counters, 0 between launches

    def select_active(self, layer: int, q: Any, batch: DeviceBatch, rule: ActiveRule) -> ActiveTokens:
        # With a count of 0 too: the next kernel relies on one that waits (kernels_cu/common/overlap.cuh).
        tokens = cupy.empty((batch.shape.sequences, rule.count), np.int32)
        return ActiveTokens(tokens, self.query_change(layer, q, batch, rule, tokens))

    def select_pages(
        self,
        layer: int,
        q: Any,
        active: ActiveTokens | None,
        batch: DeviceBatch,
        count: int,
        *,
        with_stored: bool = False,
    ) -> Selection:
        tokens, change = (None, None) if active is None else (active.tokens, active.change)
        c, shape = self._config, batch.shape
        rows = (shape.tokens if tokens is None else tokens.shape[1]) * c.group_size
        if not rows:
            return Selection(tokens, NO_PAGES, change)
        pages, words, count = batch.max_pages, batch.mark_words, min(count, batch.max_pages)
        marks = cupy.empty((shape.sequences, c.num_kv_heads, words), np.uint32)
        scores = self._page_scores(layer, q, tokens, batch, marks)
        stored, stored_rows, stored_count = NOTHING_STORED, 0, 0
        if with_stored:
            stored = batch.stored("top_pages", layer)
            _, stored_rows, stored_count = batch.stored_pages_shape
        blocks, each = divided_blocks(self._kernels.card, c.num_kv_heads, shape.sequences)
        if shape.sequences == 1:
            blocks = each = rows if tokens is None else min(rows, blocks)
        self._kernels.launch(
            "mark_pages",
            (c.num_kv_heads, blocks),
            TOP_PAGES_THREADS,
            *(scores, rows, pages, batch.caches_view(layer), tokens, c.group_size, count, marks, words),
            *(shape.sequences, each, stored, stored_rows, stored_count),
        )
        return Selection(tokens, SelectedPages(min(pages, rows * (count + stored_count)), marks), change)

    def select_stored_pages(self, layer: int, active: ActiveTokens | None, batch: DeviceBatch) -> Selection:
        tokens, change = (None, None) if active is None else (active.tokens, active.change)
        _, rows, count = batch.stored_pages_shape
        reading = rows if tokens is None else tokens.shape[1] * self._config.group_size
        if not reading:
            return Selection(tokens, NO_PAGES, change)
        limit, top = min(batch.max_pages, reading * count), batch.stored("top_pages", layer)
        return Selection(tokens, SelectedPages(limit, top=top, rows=rows, count=count), change)

    def query_change(self, layer: int, q: Any, batch: DeviceBatch, rule: ActiveRule, active: Any) -> Any:
        """Change of each token's query, float32 [tokens]; the list `active` gets the active ones."""
        change, stored = cupy.empty(len(q), np.float32), batch.stored("queries", layer)
        relative, shape = rule.threshold is not None, batch.shape
        masked = batch.is_masked if rule.masked_only else None
        self._kernels.launch(
            "query_change",
            (shape.tokens, shape.sequences),
            QUERY_CHANGE_THREADS,
            *(q, stored, q[0].size, int(relative), int(rule.follow), masked),
            *(rule.threshold if relative else -1.0, change, self._done, active, active.shape[1]),
        )
        return change

    def top_pages(self, layer: int, q: Any, batch: DeviceBatch, count: int) -> Any:
        """Top `count` pages of each query by QUEST's bound, -1 for none.

        int32 [sequences, kv_heads, rows, count].
        """
        marks = cupy.empty((batch.shape.sequences, self._config.num_kv_heads, 0), np.uint32)
        scores = self._page_scores(layer, q, None, batch, marks)
        ids = cupy.empty((*scores.shape[:3], min(count, batch.max_pages)), np.int32)
        self.rank(layer, scores[:, :, None], batch, ids.shape[3], ids=ids)
        return ids

    def rank(
        self,
        layer: int,
        scores: Any,
        batch: DeviceBatch,
        count: int,
        *,
        units: int = 1,
        stored: StoredView = NOTHING_STORED,
        ids: Any | None = None,
    ) -> None:
        """The `count` pages of highest score of each row, into `ids` or the slot.

        scores [caches, kv_heads, sums, rows, any], for each cache's last sequence: a page's is summed over
        `sums`, and over its `units` values.
        """
        caches, kv_heads, sums, rows, stride = scores.shape
        of_caches, per_cache = batch.caches_view(layer), batch.shape.per_cache
        self._kernels.launch(
            "top_pages",
            (kv_heads, rows, caches),
            TOP_PAGES_THREADS,
            *(scores, sums, units, stride, of_caches, per_cache, count, stored, ids),
        )

    def _page_scores(self, layer: int, q: Any, tokens: Any | None, batch: DeviceBatch, marks: Any) -> Any:
        """QUEST's bounds [sequences, kv_heads, rows, pages] for queries of some tokens (None: all).

        Clears `marks`.
        """
        c, kernels, shape, pages = self._config, self._kernels, batch.shape, batch.max_pages
        count = shape.tokens if tokens is None else tokens.shape[1]
        rows, sequences = count * c.group_size, shape.sequences
        scores = cupy.empty((sequences, c.num_kv_heads, rows, pages), np.float32)
        sizes = rows, c.num_kv_heads, c.head_dim, sequences
        plan = scores_plan(kernels.card, kernels.kv_bits, *sizes)
        kernels.launch_plan(
            plan,
            *(q, tokens, count, shape.tokens, c.num_heads, batch.caches_view(layer)),
            *(scores, pages, marks, marks.shape[2], sequences, plan.share),
        )
        return scores

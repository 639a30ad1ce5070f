"""Selection of active tokens and of pages on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import losart.backends.cpu.attention_kernels as kernels
from losart.backends.base import ActiveRule, ActiveTokens, Selection
from losart.backends.cpu.active_set import query_change, select_active
from losart.backends.cpu.kv_index import positions_in, top_pages, united
from losart.engine.batch import PassBatch, SequencePass


@dataclass(frozen=True, eq=False)
class PageList:
    """Pages that each kv head reads.

    Attributes
    ----------
    ids : int32 [kv_heads, capacity]
        Ascending page ids, valid up to the head's count.
    counts : int32 [kv_heads]
    positions : int
        Positions in all listed pages, summed over kv heads.
    """

    ids: np.ndarray
    counts: np.ndarray
    positions: int

    @classmethod
    def of(cls, ids: np.ndarray, counts: np.ndarray, sequence: SequencePass) -> PageList:
        """Of ids and counts of a sequence's pages."""
        positions = positions_in(ids, counts, sequence.cache.page_size, sequence.prefix_length)
        return cls(ids, counts, positions)


class Selector:
    """Implements `losart.backends.base.Selector`: a list of rows, and a PageList, per sequence."""

    def select_active(self, layer: int, q: np.ndarray, batch: PassBatch, rule: ActiveRule) -> ActiveTokens:
        tokens, changes = [], []
        for sequence, rows in batch.rows():
            stored = sequence.slot.queries[layer, : len(sequence.ids)]
            change = query_change(q[rows], stored, rule.threshold is not None)
            if rule.follow:
                np.copyto(stored, q[rows])
            tokens.append(active_tokens(change, rule, sequence.masked) + np.int32(rows.start))
            changes.append(change)
        return ActiveTokens(tokens, changes)

    def select_pages(
        self,
        layer: int,
        q: np.ndarray,
        active: ActiveTokens | None,
        batch: PassBatch,
        count: int,
        *,
        with_stored: bool = False,
    ) -> Selection:
        lists = []
        for index, (sequence, rows) in enumerate(batch.rows()):
            every = np.arange(rows.start, rows.stop, dtype=np.int32)
            tokens = every if active is None else active.tokens[index]
            table, length = sequence.cache.table, sequence.prefix_length
            ids = top_pages(kernels.bound_scores(table, layer, q, tokens, length), sequence.pages, count)
            if with_stored:
                ids = np.concatenate([ids, _stored(layer, sequence, tokens - rows.start)], axis=2)
            lists.append(_united(ids, sequence))
        return _selection(active, lists)

    def select_stored_pages(self, layer: int, active: ActiveTokens | None, batch: PassBatch) -> Selection:
        lists = []
        for index, (sequence, rows) in enumerate(batch.rows()):
            tokens = None if active is None else active.tokens[index] - rows.start
            lists.append(_united(_stored(layer, sequence, tokens), sequence))
        return _selection(active, lists)


def active_tokens(change: np.ndarray, rule: ActiveRule, masked: Sequence[int] | np.ndarray) -> np.ndarray:
    """The active tokens of a block by the change of its queries, ascending int32."""
    threshold = -1.0 if rule.threshold is None else rule.threshold
    if not rule.masked_only:
        return select_active(change, min(rule.count, len(change)), threshold)
    rows = np.asarray(masked, np.int32)
    return rows[select_active(change[rows], min(rule.count, len(rows)), threshold)]


def _selection(active: ActiveTokens | None, lists: list[PageList]) -> Selection:
    return Selection(None, lists) if active is None else Selection(active.tokens, lists, active.change)


def _united(selected: np.ndarray, sequence: SequencePass) -> PageList:
    """Pages that rows have selected, int32 [kv_heads, rows, any], united per kv head."""
    ids, counts = united(selected, sequence.pages)
    return PageList.of(ids, counts, sequence)


def _stored(layer: int, sequence: SequencePass, tokens: np.ndarray | None) -> np.ndarray:
    """Pages stored for some tokens' rows (None: all): int32 [kv_heads, rows, any]."""
    ids = sequence.slot.top_pages[layer]
    if tokens is not None:
        ids = ids.take(tokens, axis=1)
    kv_heads, count, group, pages = ids.shape
    return ids.reshape(kv_heads, count * group, pages)

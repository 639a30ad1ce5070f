"""Selection of active tokens and of pages on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import losart.backends.cpu.attention_kernels as kernels
from losart.backends.base import Selection
from losart.backends.cpu.active_set import query_change, select_active
from losart.backends.cpu.kv_index import positions_in, union_of_top_pages
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

    def select_active(
        self, layer: int, q: np.ndarray, batch: PassBatch, count: int, *, masked_only: bool, follow: bool
    ) -> list[np.ndarray]:
        active = []
        for sequence, rows in batch.rows():
            stored = sequence.slot.queries[layer]
            change = query_change(q[rows], stored)
            if follow:
                np.copyto(stored, q[rows])
            chosen = most_changed(change, count, sequence.masked if masked_only else None)
            active.append(chosen + np.int32(rows.start))
        return active

    def select_pages(
        self, layer: int, q: np.ndarray, active: list[np.ndarray] | None, batch: PassBatch, count: int
    ) -> Selection:
        lists = []
        for index, (sequence, rows) in enumerate(batch.rows()):
            tokens = np.arange(rows.start, rows.stop, dtype=np.int32) if active is None else active[index]
            table, length = sequence.cache.table, sequence.prefix_length
            lists.append(_top(kernels.bound_scores(table, layer, q, tokens, length), count, sequence))
        return Selection(active, lists)

    def select_stored_pages(self, layer: int, active: list[np.ndarray] | None, batch: PassBatch) -> Selection:
        lists = []
        for index, (sequence, rows) in enumerate(batch.rows()):
            masses, count = sequence.slot.masses[layer]
            if active is not None:
                masses = masses.take(active[index] - rows.start, axis=1)
            kv_heads, tokens, group, pages = masses.shape
            lists.append(_top(masses.reshape(kv_heads, tokens * group, pages), count, sequence))
        return Selection(active, lists)


def most_changed(change: np.ndarray, count: int, candidates: np.ndarray | None) -> np.ndarray:
    """The `count` tokens of largest change, ascending: of `candidates`, or all where it is None."""
    if candidates is None:
        return select_active(change, count)
    return candidates[select_active(change[candidates], min(count, len(candidates)))]


def _top(scores: np.ndarray, count: int, sequence: SequencePass) -> PageList:
    """Top `count` pages of each row of scores [kv_heads, rows, pages], united per kv head."""
    ids, counts = union_of_top_pages(scores, sequence.pages, min(count, sequence.pages + 1))
    return PageList.of(ids, counts, sequence)

"""Results that one kernel leaves open for the next one, with the views that kernels take of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from losart.backends.cuda.slots import Slot
from losart.kernels_cu.constants import PANEL_ROWS
from losart.kernels_cu.views import MatmulView, PagesView, PartsView, StoredView, WeightView

NOTHING_STORED = StoredView(None, 0)
NO_MATMUL = MatmulView(None, None, 0, 0, PANEL_ROWS, 1, 1)


class Weight:
    """A matrix [rows, inner] in the format of weights.

    Parameters
    ----------
    values : array [rows, inner]

    Attributes
    ----------
    fresh : bool
        Whether a kernel of the same pass writes it: the next one must not read it early.
    view : WeightView
        As kernels take it.
    """

    def __init__(self, values: Any, fresh: bool = False) -> None:
        self.values = values
        self.fresh = fresh
        self.view = WeightView(values.data.ptr, *values.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, inner)"""
        return self.values.shape


@dataclass(frozen=True, eq=False)
class Matmul:
    """The result of a matmul as its kernel leaves it (kernels_cu/matmul/planes.cuh).

    Attributes
    ----------
    planes : float32 [planes, tokens, rows]
    bias : float32 [rows] or None
    steps, share, panel_rows : int
        Which planes hold a row's sums.
    """

    planes: Any
    bias: Any | None
    steps: int = 1
    share: int = 1
    panel_rows: int = PANEL_ROWS

    def __len__(self) -> int:
        return self.planes.shape[1]

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.planes.shape[2]

    @property
    def view(self) -> MatmulView:
        """As kernels take it."""
        bias = None if self.bias is None else self.bias.data.ptr
        sizes = len(self), self.rows, self.panel_rows, self.steps, self.share
        return MatmulView(self.planes.data.ptr, bias, *sizes)


@dataclass(frozen=True, eq=False)
class SelectedPages:
    """Pages that each kv head reads.

    Attributes
    ----------
    limit : int
        Pages of a kv head at most.
    marks : uint32 [sequences, kv_heads, words], optional
        One bit per page. Or:
    top : StoredView
        int32 [kv_heads, rows, count] in each slot: pages that each row has selected, -1 for none.
    rows, count : int
    """

    limit: int
    marks: Any = None
    top: StoredView = NOTHING_STORED
    rows: int = 0
    count: int = 0

    @property
    def view(self) -> PagesView:
        """As kernels take it."""
        if self.marks is None:
            return PagesView(None, self.top, 0, self.rows, self.count)
        return PagesView(self.marks.data.ptr, self.top, self.marks.shape[2], 0, 0)

    def on_host(
        self, index: int, slot: Slot, tokens: np.ndarray | None, kv_heads: int, group: int, stream: Any
    ) -> list[np.ndarray]:
        """Page ids of a sequence's kv heads, ascending, that tokens of `group` rows each read (None: all)."""
        if not self.limit:
            return [np.empty(0, np.int64)] * kv_heads
        if self.marks is not None:
            bits = np.unpackbits(
                self.marks[index].get(stream=stream).view(np.uint8), axis=1, bitorder="little"
            )
            return [np.flatnonzero(row) for row in bits]
        top = slot.array(self.top.offset, (kv_heads, self.rows, self.count), np.int32).get(stream=stream)
        if tokens is not None:
            top = top[:, (tokens[:, None] * group + np.arange(group)).reshape(-1)]
        return [np.unique(of_head[of_head >= 0]) for of_head in top]


NO_PAGES = SelectedPages(0)


@dataclass(frozen=True, eq=False)
class PrefixParts:
    """Attention over the prefix as its kernel leaves it (kernels_cu/attention/parts.cuh).

    Attributes
    ----------
    o : float32 [parts of all caches, tokens, heads, head_dim]
    tops, totals : float32 [parts of all caches, tokens, heads]
    caches : int
    starts : int32 [caches + 1] or None
        Every cache's first part; None: all have as many.
    tokens : int32 [caches, tokens] or None
        Whose the parts are, -1 after the last; None: all tokens'.
    stored_queries, stored_o, stored_lse : StoredView
        Where `block_attention` stores their queries, if anywhere, and merged results, and finds the results
        of all other tokens.
    """

    o: Any
    tops: Any
    totals: Any
    caches: int = 1
    starts: Any | None = None
    tokens: Any | None = None
    stored_queries: StoredView = NOTHING_STORED
    stored_o: StoredView = NOTHING_STORED
    stored_lse: StoredView = NOTHING_STORED

    @classmethod
    def empty(
        cls, parts: int, tokens: int, heads: int, head_dim: int, caches: int = 1, starts: Any | None = None
    ) -> PrefixParts:
        """Parts for a kernel to write."""
        shape = (parts, tokens, heads)
        tops, totals = (cupy.empty(shape, np.float32) for _ in range(2))
        return cls(cupy.empty((*shape, head_dim), np.float32), tops, totals, caches, starts)

    @property
    def view(self) -> PartsView:
        """As kernels take it."""
        parts, tokens = self.o.shape[:2]
        starts = None if self.starts is None else self.starts.data.ptr
        arrays = self.o.data.ptr, self.tops.data.ptr, self.totals.data.ptr
        return PartsView(*arrays, starts, parts // self.caches, tokens)

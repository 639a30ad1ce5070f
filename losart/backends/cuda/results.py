"""Results that a kernel leaves open, for the next one to add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np


@dataclass(frozen=True)
class Product:
    """A matrix product as its kernel leaves it (kernels_cu/product.cuh).

    Attributes
    ----------
    values : float32 [planes, tokens, rows]
    bias : float32 [rows] or None
    steps, share : int
        Which planes hold a row's sums.
    """

    values: Any
    bias: Any | None
    steps: int = 1
    share: int = 1

    def __len__(self) -> int:
        return self.values.shape[1]

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.values.shape[2]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As kernels take it."""
        return self.values, self.bias, len(self), self.rows, self.steps, self.share


NO_PRODUCT = (None, None, 0, 0, 1, 1)


@dataclass(frozen=True)
class ChosenPages:
    """Pages that each kv head reads, as kernels take them (kernels_cu/page_list.cuh).

    Attributes
    ----------
    most : int
        Pages of a kv head at most.
    marks : uint32 [kv_heads, words], optional
        A bit a page. Or:
    selected : int32 [kv_heads, rows, count], optional
        Pages that each row has selected, -1 for none.
    tokens : int32 [any], optional
        Whose rows of `selected` count; None: all.
    group : int
        Rows of a token.
    """

    most: int
    marks: Any = None
    selected: Any = None
    tokens: Any = None
    group: int = 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As kernels take it."""
        words = 0 if self.marks is None else self.marks.shape[1]
        rows, count = (0, 0) if self.selected is None else self.selected.shape[1:]
        return self.marks, words, self.selected, rows, count

    def on_host(self, stream: Any) -> list[np.ndarray]:
        """Page ids of each kv head, rising."""
        if self.marks is not None:
            bits = np.unpackbits(self.marks.get(stream=stream).view(np.uint8), axis=1, bitorder="little")
            return [np.flatnonzero(row) for row in bits]
        selected = self.selected.get(stream=stream)
        if self.tokens is not None:
            tokens = self.tokens.get(stream=stream)
            rows = tokens[tokens >= 0, None] * self.group + np.arange(self.group)
            selected = selected[:, rows.reshape(-1)]
        return [np.unique(of_head[of_head >= 0]) for of_head in selected]


NO_PAGES = ChosenPages(0)


@dataclass(frozen=True)
class PrefixParts:
    """Attention over the prefix as its kernel leaves it (kernels_cu/parts.cuh).

    Attributes
    ----------
    o : float32 [parts, tokens, heads, head_dim]
    tops, totals : float32 [parts, tokens, heads]
    """

    o: Any
    tops: Any
    totals: Any

    @classmethod
    def empty(cls, parts: int, tokens: int, heads: int, head_dim: int) -> PrefixParts:
        """Parts for a kernel to write."""
        shape = (parts, tokens, heads)
        tops, totals = (cupy.empty(shape, np.float32) for _ in range(2))
        return cls(cupy.empty((*shape, head_dim), np.float32), tops, totals)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As kernels take it."""
        return self.o, self.tops, self.totals, len(self.o)


@dataclass(frozen=True)
class RefreshedPrefix:
    """Kept results of attention over the prefix, of which those of some tokens are to be replaced.

    Attributes
    ----------
    parts : PrefixParts
        Of the tokens, not merged yet.
    tokens : int32 [any] or None
        -1 after the last; None: all.
    kept : (float32 [tokens, heads, head_dim], float32 [tokens, heads])
        o and log-sum-exp; whoever merges the parts writes them there.
    """

    parts: PrefixParts
    tokens: Any | None
    kept: tuple[Any, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As `block_attention` takes it."""
        return *self.parts.arguments, self.tokens, self.parts.o.shape[1], *self.kept

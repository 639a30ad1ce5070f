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

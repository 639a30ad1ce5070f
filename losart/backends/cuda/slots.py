"""Slots: what passes over a block of one sequence store for later ones.

A slot is one block of memory. Kernels find its arrays by offsets from an address in the pass's buffers
(StoredView), so that a captured graph works on whatever slot it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cupy
import numpy as np

from losart.backends.base import StoredResults
from losart.config.model import ModelConfig
from losart.config.options import PAGE_UNIT

ALIGNMENT = 256  # bytes


@dataclass(frozen=True, eq=False)
class Slot:
    """One sequence's stored results.

    Attributes
    ----------
    stored : StoredResults
    layout : dict of str to (int, int)
        Of the arrays queries, o, lse and top_pages: bytes before the first layer, and of a layer.
    memory : uint8 [bytes]
    """

    stored: StoredResults
    layout: dict[str, tuple[int, int]]
    memory: Any

    @classmethod
    def empty(cls, stored: StoredResults, config: ModelConfig) -> Slot:
        """A slot for these results; nothing in it is valid."""
        rows = stored.tokens * config.num_heads if stored.attention else 0
        pages = min(stored.top_pages, -(-config.max_positions // PAGE_UNIT))
        sizes = {"queries": rows * config.head_dim, "o": rows * config.head_dim, "lse": rows}
        sizes["top_pages"] = config.num_kv_heads * stored.top_pages_rows * pages
        layout, end = {}, 0
        for name, count in sizes.items():  # values of 4 bytes
            layout[name] = end, 4 * count
            end += -(-4 * count * config.num_layers // ALIGNMENT) * ALIGNMENT
        return cls(stored, layout, cupy.empty(end, np.uint8))

    @cached_property
    def address(self) -> int:
        """Of the memory on the device."""
        return int(self.memory.data.ptr)

    def offset(self, name: str, layer: int) -> int:
        """Bytes before a layer of an array."""
        first, size = self.layout[name]
        return first + layer * size

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """What lies at an offset, as an array."""
        return self.memory[offset : offset + 4 * math.prod(shape)].view(dtype).reshape(shape)

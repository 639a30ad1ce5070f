"""Slots: what passes over a block of one sequence store for later ones.

A slot is one block of memory. Kernels find its arrays by offsets from an address in the pass's buffers
(StoredView), so that a captured graph works on whatever slot it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from losart.backends.base import StoredResults
from losart.backends.cuda.memory import DeviceMemory
from losart.config.model import ModelConfig
from losart.config.options import PAGE_UNIT

ALIGNMENT = 256  # bytes
FREE_SLOTS = 4  # kept for sequences to come


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

    def offset(self, name: str, layer: int) -> int:
        """Bytes before a layer of an array."""
        first, size = self.layout[name]
        return first + layer * size

    def array(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """What lies at an offset, as an array."""
        return self.memory[offset : offset + 4 * math.prod(shape)].view(dtype).reshape(shape)


class Slots:
    """Allocates slots, and keeps some that were freed.

    Parameters
    ----------
    config : ModelConfig
    memory : DeviceMemory
    """

    def __init__(self, config: ModelConfig, memory: DeviceMemory) -> None:
        self._config = config
        self._memory = memory
        self.freed: list[Slot] = []

    def allocate(self, stored: StoredResults) -> Slot:
        """A slot for these results; nothing in it is valid."""
        layout, size = self._layout(stored)
        with self._memory.running("stored results"):
            for slot in self.freed:
                if slot.stored == stored:
                    self.freed.remove(slot)
                    return slot
            return Slot(stored, layout, cupy.empty(size, np.uint8))

    def free(self, slot: Slot) -> None:
        """Keep a slot for another sequence; of too many the oldest is dropped."""
        with self._memory.lock:  # nothing is launched: a generation may be abandoned anywhere
            self.freed.append(slot)
            del self.freed[:-FREE_SLOTS]

    def _layout(self, stored: StoredResults) -> tuple[dict[str, tuple[int, int]], int]:
        c, rows = self._config, stored.tokens * self._config.num_heads
        values = (
            {"queries": rows * c.head_dim, "o": rows * c.head_dim, "lse": rows} if stored.attention else {}
        )
        pages = min(stored.top_pages, -(-c.max_positions // PAGE_UNIT))
        values["top_pages"] = c.num_kv_heads * stored.top_pages_rows * pages
        layout, end = {}, 0
        for name, count in values.items():  # of 4 bytes
            layout[name] = end, 4 * count
            end += -(-4 * count * c.num_layers // ALIGNMENT) * ALIGNMENT
        return layout, end

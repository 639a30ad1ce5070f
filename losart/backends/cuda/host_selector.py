"""Selection of active tokens and of pages on the host, in Cython, as the CPU backend does it.

The device ranks: it measures the change of queries, and finds the top pages of every query of the block. The
host takes the active tokens from that, and unites their pages per kv head. With one transfer each way per
layer, for which the device waits, a pass cannot be captured. What is selected is the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from losart.backends.base import ActiveRule, ActiveTokens, Selection
from losart.backends.cpu.kv_index import mark_pages
from losart.backends.cpu.selector import active_tokens
from losart.backends.cuda.batch import DeviceBatch
from losart.backends.cuda.results import NO_PAGES, SelectedPages
from losart.backends.cuda.selector import DeviceSelector
from losart.config.model import ModelConfig


class HostSelector:
    """Implements `losart.backends.base.Selector`.

    Active tokens are selected together with their pages: until then they are known by their rule alone.

    Parameters
    ----------
    config : ModelConfig
    device : DeviceSelector
        Measures and ranks.
    """

    def __init__(self, config: ModelConfig, device: DeviceSelector) -> None:
        self._config = config
        self._device = device

    def select_active(self, layer: int, q: Any, batch: DeviceBatch, rule: ActiveRule) -> ActiveTokens:
        none = cupy.empty(0, np.int32)
        return ActiveTokens(rule, self._device.query_change(layer, q, batch, rule, none))

    def select_pages(
        self, layer: int, q: Any, active: ActiveTokens | None, batch: DeviceBatch, count: int
    ) -> Selection:
        if active is not None and not active.tokens.count:
            return Selection(cupy.empty(0, np.int32), NO_PAGES, active.change)
        return self._unite(self._device.top_pages(layer, q, batch, count), active, batch)

    def select_stored_pages(self, layer: int, active: ActiveTokens | None, batch: DeviceBatch) -> Selection:
        if active is not None and not active.tokens.count:
            return Selection(cupy.empty(0, np.int32), NO_PAGES, active.change)
        offset = batch.slot.offset("top_pages", layer)
        return self._unite(batch.slot.array(offset, batch.stored_pages_shape, np.int32), active, batch)

    def _unite(self, top: Any, active: ActiveTokens | None, batch: DeviceBatch) -> Selection:
        """Pages top [kv_heads, rows, count] of the active tokens or all, united per kv head."""
        group, words = self._config.group_size, batch.mark_words
        kv_heads, rows, count = top.shape
        if active is None:
            marks = cupy.asarray(mark_pages(top.get(), None, group, words))
            return Selection(None, SelectedPages(min(32 * words, rows * count), marks))
        rule: ActiveRule = active.tokens
        both = cupy.concatenate([active.change.view(np.int32), top.ravel()]).get()
        change, ids = both[: len(active.change)].view(np.float32), both[len(active.change) :]
        chosen = active_tokens(change, rule, batch.sequence.masked)
        marks = mark_pages(ids.reshape(top.shape), chosen, group, words)
        padded = np.full(rule.count, -1, np.int32)
        padded[: len(chosen)] = chosen
        united = cupy.asarray(np.concatenate([padded, marks.view(np.int32).ravel()]))
        marks = united[rule.count :].view(np.uint32).reshape(kv_heads, words)
        pages = SelectedPages(min(32 * words, rule.count * group * count), marks)
        return Selection(united[: rule.count], pages, active.change)

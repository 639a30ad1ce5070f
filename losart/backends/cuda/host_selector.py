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
        none = cupy.empty((batch.shape.sequences, 0), np.int32)
        return ActiveTokens(rule, self._device.query_change(layer, q, batch, rule, none))

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
        if active is not None and not active.tokens.count:
            return self._nothing(active, batch)
        top = self._device.top_pages(layer, q, batch, count)
        if with_stored:
            top = cupy.concatenate([top, self._stored(layer, batch)], axis=3)
        return self._unite(top, active, batch)

    def select_stored_pages(self, layer: int, active: ActiveTokens | None, batch: DeviceBatch) -> Selection:
        if active is not None and not active.tokens.count:
            return self._nothing(active, batch)
        return self._unite(self._stored(layer, batch), active, batch)

    def _stored(self, layer: int, batch: DeviceBatch) -> Any:
        """What `store_top_pages` stored: int32 [sequences, kv_heads, rows, count], -1 for none."""
        offset, shape = batch.slot.offset("top_pages", layer), batch.stored_pages_shape
        top = cupy.full((batch.shape.sequences, *shape), -1, np.int32)  # of those that pad the group none
        for of_sequence, sequence in zip(top, batch.sequences, strict=False):
            of_sequence[...] = sequence.slot.array(offset, shape, np.int32)
        return top

    def _nothing(self, active: ActiveTokens, batch: DeviceBatch) -> Selection:
        return Selection(cupy.empty((batch.shape.sequences, 0), np.int32), NO_PAGES, active.change)

    def _unite(self, top: Any, active: ActiveTokens | None, batch: DeviceBatch) -> Selection:
        """Pages top [sequences, kv_heads, rows, count] of the active tokens or all, united per kv head."""
        group, words = self._config.group_size, batch.mark_words
        _, kv_heads, rows, count = top.shape
        if active is None:
            marks = np.stack([mark_pages(ids, None, group, words) for ids in top.get()])
            return Selection(None, SelectedPages(min(32 * words, rows * count), cupy.asarray(marks)))
        rule: ActiveRule = active.tokens
        both = cupy.concatenate([active.change.view(np.int32), top.ravel()]).get()
        changes = both[: len(active.change)].view(np.float32).reshape(-1, batch.shape.tokens)
        ids = both[len(active.change) :].reshape(top.shape)
        tokens = np.full((len(ids), rule.count), -1, np.int32)
        marks = np.zeros((len(ids), kv_heads, words), np.uint32)
        for index, sequence in enumerate(batch.sequences):
            chosen = active_tokens(changes[index], rule, sequence.masked)
            tokens[index, : len(chosen)] = chosen
            marks[index] = mark_pages(ids[index], chosen, group, words)
        united = cupy.asarray(np.concatenate([tokens.ravel(), marks.view(np.int32).ravel()]))
        of_pages = united[tokens.size :].view(np.uint32).reshape(marks.shape)
        pages = SelectedPages(min(32 * words, rule.count * group * count), of_pages)
        return Selection(united[: tokens.size].reshape(tokens.shape), pages, active.change)

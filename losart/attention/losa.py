"""LoSA, locality-aware sparse attention (arXiv 2604.12056, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from losart.attention.base import AttentionPolicy, PassKind
from losart.backends.base import Prefix
from losart.cache import PagedKVCache


@dataclass
class LayerState:
    """One layer's memory of the block: the last pass's queries, and each token's prefix attention."""

    q: Any
    prefix: Prefix


class LosaPolicy(AttentionPolicy):
    """Tokens whose queries changed most read the prefix, sparsely; the others reuse their results.

    The first pass over a block is dense and fills the state. In later passes the `active` tokens
    of largest query change select pages by QUEST's bound, and attend to the union per kv head;
    their new results replace the stored ones.
    """

    dense_first_pass = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._active_count = self.config.active_count(self.block_length)
        self._state: dict[int, LayerState] = {}

    def begin_block(self) -> None:
        super().begin_block()
        self._state.clear()

    def prefix(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        if self.kind is PassKind.FIRST:
            self._state[layer] = LayerState(q, backend.prefix_attention(q, cache, layer))
        else:
            self._refresh(backend, layer, q, cache)
        return self._state[layer].prefix

    def _refresh(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> None:
        state = self._state[layer]
        active = backend.select_active(q, state.q, self._active_count)
        pages = backend.select_pages(q, active, cache, layer, self.config.pages_per_query)
        self.reads.sparse(pages.positions, cache.length, len(active))
        backend.sparse_prefix_attention(q, active, pages, cache, layer, into=state.prefix)
        state.q = q

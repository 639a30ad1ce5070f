"""LoSA, locality-aware sparse attention (arXiv 2604.12056, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from losart.attention.base import AttentionPolicy, PassKind
from losart.backends.base import Prefix
from losart.cache import PagedKVCache, PageList


@dataclass
class LayerState:
    """One layer's memory of the block.

    Attributes
    ----------
    q : [tokens, heads, head_dim]
        What each token's query change is measured against.
    prefix : Prefix
        Each token's prefix attention.
    masses : [kv_heads, tokens, group, pages], optional
        Of the first pass, where they select pages.
    """

    q: Any
    prefix: Prefix
    masses: Any = None


class LosaPolicy(AttentionPolicy):
    """Tokens whose queries changed most read the prefix, sparsely; the others reuse their results.

    The first pass over a block is dense and fills the state. In later passes the `active` tokens
    of largest query change select pages, by QUEST's bound or by the masses of the first pass, and
    attend to the union per kv head; their new results replace the stored ones.
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
            self._state[layer] = self._fill(backend, layer, q, cache)
        else:
            self._refresh(backend, layer, q, cache)
        return self._state[layer].prefix

    def _fill(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> LayerState:
        if self.config.selector == "quest":
            return LayerState(q, backend.prefix_attention(q, cache, layer))
        o, lse, masses = backend.prefix_attention_and_masses(q, cache, layer)
        return LayerState(q, (o, lse), masses)

    def _refresh(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> None:
        state = self._state[layer]
        candidates = self.masked if self.config.candidates == "masked" else None
        active = backend.select_active(q, state.q, self._active_count, candidates)
        pages = self._select_pages(backend, layer, q, active, cache)
        # Not the length of `active`, which a backend may have padded.
        tokens = self._active_count if candidates is None else min(self._active_count, len(candidates))
        self.reads.sparse(pages.positions, cache.length, tokens)
        backend.sparse_prefix_attention(q, active, pages, cache, layer, into=state.prefix)
        if self.config.drift == "previous":
            state.q = q
        else:
            backend.copy_tokens(q, active, into=state.q)

    def _select_pages(self, backend: Any, layer: int, q: Any, active: Any, cache: PagedKVCache) -> PageList:
        count = self.config.pages_per_query
        if self.config.selector == "quest":
            return backend.select_pages(q, active, cache, layer, count)
        return backend.select_pages_by_mass(self._state[layer].masses, active, cache, count)

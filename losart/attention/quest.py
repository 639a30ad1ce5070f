"""QUEST (arXiv 2406.10774) for a block: the pages of all its queries, united per kv head."""

from __future__ import annotations

from typing import Any

from losart.attention.policy import AttentionPolicy
from losart.backends.base import Prefix
from losart.engine.kv_cache import PagedKVCache


class QuestPolicy(AttentionPolicy):
    """Every token selects its pages anew in every layer and pass, the first included by default."""

    def prefix(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        pages = backend.select_pages(q, None, cache, layer, self.config.pages_per_query)
        return backend.sparse_prefix_attention(q, None, pages, cache, layer)

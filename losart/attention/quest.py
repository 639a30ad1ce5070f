"""QUEST (arXiv 2406.10774) for a block: the pages of all its queries, united per kv head."""

from __future__ import annotations

from typing import Any

from losart.attention.policy import AttentionPolicy
from losart.backends.base import Prefix, Selection


class QuestPolicy(AttentionPolicy):
    """Every token selects its pages anew in every layer and pass, the first included by default."""

    def prefix(self, backend: Any, layer: int, q: Any, batch: Any) -> tuple[Prefix, Selection | None]:
        selector = backend.selectors[self.config.planner]
        selection = selector.select_pages(layer, q, None, batch, self.config.pages_per_query)
        return backend.sparse_prefix_attention(layer, q, selection, batch), selection

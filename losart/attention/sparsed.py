"""SparseD (arXiv 2509.24014) for a block: one pattern from the dense first pass, reused."""

from __future__ import annotations

from typing import Any

import numpy as np

from losart.attention.base import AttentionPolicy, PassKind
from losart.backends.base import Prefix
from losart.cache import PagedKVCache, PageList


class SparsedPolicy(AttentionPolicy):
    """The pages of highest attention mass in the first pass serve all later passes and tokens.

    The mass is summed over the block's tokens for each query head; the pages of a group of query
    heads are united.
    """

    dense_first_pass = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pages: dict[int, PageList] = {}

    def begin_block(self) -> None:
        super().begin_block()
        self._pages.clear()

    def prefix(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        if self.kind is PassKind.FIRST:
            o, lse, masses = backend.prefix_attention_and_masses(q, cache, layer)
            self._pages[layer] = backend.select_pages_by_score(
                masses.sum(axis=1), cache, self.config.pages_per_query
            )
            return o, lse
        pages = self._pages[layer]
        self.reads.sparse(pages.positions, cache.length, self.block_length)
        tokens = np.arange(self.block_length, dtype=np.int32)
        return backend.sparse_prefix_attention(q, tokens, pages, cache, layer)

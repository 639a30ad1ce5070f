"""SparseD (arXiv 2509.24014) for a block: one pattern from the dense first pass, reused."""

from __future__ import annotations

from typing import Any

from losart.attention.policy import AttentionPolicy, PassKind
from losart.backends.base import Prefix
from losart.config.checks import require
from losart.engine.kv_cache import PagedKVCache
from losart.errors import OptionError


class SparsedPolicy(AttentionPolicy):
    """The pages of highest attention mass in the first pass serve all later passes and tokens.

    The mass is summed over the block's tokens for each query head; the pages of a group of query
    heads are united.
    """

    dense_first_pass = True
    keeps = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        require(
            self.config.first_pass != "sparse",
            OptionError,
            'first_pass must not be "sparse" with attention="sparsed", which takes the masses of pages from '
            "a dense first pass",
        )

    def prefix(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        count = self.config.pages_per_query
        if self.kind is PassKind.FIRST:
            prefix, masses = backend.prefix_attention_and_masses(q, cache, layer)
            backend.keep_masses(self.memory, (layer, "masses"), masses, cache, count, summed=True)
            return prefix
        pages = backend.select_pages_by_mass(self.kept(layer, "masses"), None, cache, count)
        return backend.sparse_prefix_attention(q, None, pages, cache, layer)

"""LoSA, locality-aware sparse attention (arXiv 2604.12056, section 3)."""

from __future__ import annotations

from typing import Any

from losart.attention.policy import AttentionPolicy, PassKind
from losart.backends.base import Prefix
from losart.config.checks import require
from losart.engine.kv_cache import PagedKVCache
from losart.errors import OptionError


class LosaPolicy(AttentionPolicy):
    """Tokens whose queries changed most read the prefix, sparsely; the others reuse their results.

    The first pass over a block reads for all tokens, densely unless `first_pass="sparse"`, and fills
    the memory: `q`, which each token's change is measured against, `prefix`, its result, and with
    `selector="anchor"` the `masses` of pages. In later passes the `active` tokens of largest query
    change select pages, by QUEST's bound or by those masses, and attend to the union per kv head;
    their new results replace the stored ones.
    """

    dense_first_pass = True
    keeps = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        require(
            self.config.first_pass != "sparse" or self.config.selector != "anchor",
            OptionError,
            'first_pass must not be "sparse" with selector="anchor", which ranks pages by their masses in a '
            "dense first pass",
        )
        self._active_count = self.config.active_count(self.block_length)

    @property
    def _readers(self) -> int:
        if self.kind is PassKind.FIRST:
            return self.block_length
        if self.config.candidates == "masked":
            return min(self._active_count, len(self.masked))
        return self._active_count

    def prefix(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        if self.kind is not PassKind.FIRST:
            return self._refresh(backend, layer, q, cache)
        self._fill(backend, layer, q, cache)
        return self.kept(layer, "prefix")

    def _fill(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> None:
        memory, config = self.memory, self.config
        if not self._dense_pass():
            pages = backend.select_pages(q, None, cache, layer, config.pages_per_query)
            prefix = backend.sparse_prefix_attention(q, None, pages, cache, layer)
        elif config.selector == "quest":
            prefix = backend.prefix_attention(q, cache, layer)
        else:
            prefix, masses = backend.prefix_attention_and_masses(q, cache, layer)
            count = config.pages_per_query
            backend.keep_masses(memory, (layer, "masses"), masses, cache, count, summed=False)
        backend.keep_prefix(memory, (layer, "prefix"), prefix)
        backend.keep(memory, (layer, "q"), q)

    def _refresh(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        config, previous = self.config, self.kept(layer, "q")
        candidates = self.masked if config.candidates == "masked" else None
        follow = config.drift == "previous"
        active = backend.select_active(q, previous, self._active_count, candidates, keep=follow)
        if config.selector == "quest":
            pages = backend.select_pages(q, active, cache, layer, config.pages_per_query)
        else:
            masses = self.kept(layer, "masses")
            pages = backend.select_pages_by_mass(masses, active, cache, config.pages_per_query)
        kept = self.kept(layer, "prefix")
        prefix = backend.sparse_prefix_attention(q, active, pages, cache, layer, into=kept)
        if not follow:
            backend.copy_tokens(q, active, into=previous)
        return prefix

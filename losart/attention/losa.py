"""LoSA, locality-aware sparse attention (arXiv 2604.12056, section 3)."""

from __future__ import annotations

from typing import Any

from losart.attention.policy import AttentionPolicy
from losart.backends.base import ActiveRule, Prefix, Selection, StoredResults
from losart.engine.batch import PassKind
from losart.errors import OptionError


class LosaPolicy(AttentionPolicy):
    """Tokens whose queries changed read the prefix, sparsely; the others reuse their results.

    The first pass over a block reads for all tokens, densely unless `first_pass="sparse"`, and stores each
    token's query, which its change is measured against, its result, and the pages of highest mass for it, if
    `selector` has them. In later passes the active tokens, those whose queries changed by more than a
    threshold, or so many that changed most, select pages, by QUEST's bound, those stored ones or half by
    each, and attend to the union per kv head; their new results replace the stored ones.
    """

    dense_first_pass = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = self.config
        if config.first_pass == "sparse" and config.selector not in ("auto", "quest"):
            raise OptionError(
                f'first_pass must not be "sparse" with selector="{config.selector}", which ranks pages by '
                "their masses in a dense first pass"
            )
        self._by_mass = config.pages_by_mass
        self._by_bound = config.pages_per_query - self._by_mass
        self._rule = ActiveRule(
            config.active_count(self.block_length),
            float(config.change_threshold) if config.active == "auto" else None,
            config.candidates == "masked",
            config.drift == "previous" or (config.drift == "auto" and config.active != "auto"),
        )

    @property
    def stored(self) -> StoredResults:
        rows = self.block_length * self.model.group_size if self._by_mass else 0
        return StoredResults(self.block_length, attention=True, top_pages=self._by_mass, top_pages_rows=rows)

    def prefix(self, backend: Any, layer: int, q: Any, batch: Any) -> tuple[Prefix, Selection | None]:
        if batch.kind is PassKind.FIRST:
            return self._fill(backend, layer, q, batch)
        return self._refresh(backend, layer, q, batch)

    def _fill(self, backend: Any, layer: int, q: Any, batch: Any) -> tuple[Prefix, Selection | None]:
        config, selection = self.config, None
        if not self.is_dense(PassKind.FIRST):
            selector = backend.selectors[config.planner]
            selection = selector.select_pages(layer, q, None, batch, self._by_bound)
            prefix = backend.sparse_prefix_attention(layer, q, selection, batch)
        elif self._by_mass:
            prefix, masses = backend.prefix_attention_and_masses(layer, q, batch)
            backend.store_top_pages(layer, masses, batch, self._by_mass, summed=False)
        else:
            prefix = backend.prefix_attention(layer, q, batch)
        return backend.store_attention(layer, q, prefix, batch), selection

    def _refresh(self, backend: Any, layer: int, q: Any, batch: Any) -> tuple[Prefix, Selection | None]:
        selector = backend.selectors[self.config.planner]
        active = selector.select_active(layer, q, batch, self._rule)
        if self._by_bound:
            has_stored = self._by_mass > 0
            selection = selector.select_pages(layer, q, active, batch, self._by_bound, with_stored=has_stored)
        else:
            selection = selector.select_stored_pages(layer, active, batch)
        stores = not self._rule.follow
        return backend.refresh_prefix_attention(layer, q, selection, batch, store_queries=stores), selection

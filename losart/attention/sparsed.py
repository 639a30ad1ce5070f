"""SparseD (arXiv 2509.24014) for a block: one pattern from the dense first pass, reused."""

from __future__ import annotations

from typing import Any

from losart.attention.policy import AttentionPolicy
from losart.backends.base import Prefix, Selection, StoredResults
from losart.engine.batch import PassKind
from losart.errors import OptionError


class SparsedPolicy(AttentionPolicy):
    """The pages of highest attention mass in the first pass serve all later passes and tokens.

    The mass is summed over the block's tokens for each query head; the pages of a group of query
    heads are united.
    """

    dense_first_pass = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.config.first_pass == "sparse":
            raise OptionError(
                'first_pass must not be "sparse" with attention="sparsed", which takes the masses of pages '
                "from a dense first pass"
            )

    @property
    def stored(self) -> StoredResults:
        pages, rows = self.config.pages_per_query, self.model.group_size
        return StoredResults(self.block_length, top_pages=pages, top_pages_rows=rows)

    def prefix(self, backend: Any, layer: int, q: Any, batch: Any) -> tuple[Prefix, Selection | None]:
        if batch.kind is PassKind.FIRST:
            prefix, masses = backend.prefix_attention_and_masses(layer, q, batch)
            backend.store_top_pages(layer, masses, batch, self.config.pages_per_query, summed=True)
            return prefix, None
        selection = backend.selectors[self.config.planner].select_stored_pages(layer, None, batch)
        return backend.sparse_prefix_attention(layer, q, selection, batch), selection

"""Dense attention: every pass reads the whole prefix."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from losart.attention.policy import AttentionPolicy
from losart.backends.base import Prefix
from losart.engine.kv_cache import PagedKVCache


class DensePolicy(AttentionPolicy):
    """Reads the whole prefix in every layer and pass."""

    @property
    def shape(self) -> Hashable:
        """All passes are alike, whatever the options of other methods."""
        return type(self), self.block_length

    def _dense_pass(self) -> bool:
        return True

    def prefix(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        return backend.prefix_attention(q, cache, layer)

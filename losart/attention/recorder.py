"""Notes what each layer of a pass reads of the prefix, by standing between the policy and the backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from losart.backends.base import Array, Pages, Prefix
from losart.engine.kv_cache import PagedKVCache


@dataclass(frozen=True)
class LayerRead:
    """What one layer read of the prefix; arrays are the backend's own.

    Attributes
    ----------
    tokens : int32 [any], optional
        Tokens of the block that read; negative places hold none. None: all of them.
    pages : Pages, optional
        None: all of them.
    """

    tokens: Any = None
    pages: Pages = None


class ReadRecorder:
    """A backend whose reads of the prefix are noted; all else is the backend's.

    It copies nothing. A backend that replays passes calls it when a pass is captured, and the noted
    arrays then hold what the last replay wrote.

    Parameters
    ----------
    backend : Backend

    Attributes
    ----------
    reads : dict of int to LayerRead
        By layer, of the pass that was run last.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.reads: dict[int, LayerRead] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def prefix_attention(self, q: Array, cache: PagedKVCache, layer: int) -> Prefix:
        self.reads[layer] = LayerRead()
        return self._backend.prefix_attention(q, cache, layer)

    def prefix_attention_and_masses(self, q: Array, cache: PagedKVCache, layer: int) -> tuple[Prefix, Array]:
        self.reads[layer] = LayerRead()
        return self._backend.prefix_attention_and_masses(q, cache, layer)

    def sparse_prefix_attention(
        self,
        q: Array,
        tokens: Array | None,
        pages: Pages,
        cache: PagedKVCache,
        layer: int,
        into: tuple[Array, Array] | None = None,
    ) -> Prefix:
        self.reads[layer] = LayerRead(tokens, pages)
        return self._backend.sparse_prefix_attention(q, tokens, pages, cache, layer, into)

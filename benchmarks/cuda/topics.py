"""Keys and queries with topics, so that attention is concentrated as that of trained models is.

With white noise every page ties, and each query prefers other pages. Here the prefix goes through
topics in segments of 128 positions; a key is its topic's direction plus noise. The queries of a kv
head's group and of a block's tokens ask for few topics, most of them in common. Passes differ by
small changes of all queries and large ones of a few tokens.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from benchmarks.cuda.noise import written_cache
from losart.backends.cuda.backend import CudaBackend

SEGMENT = 128  # positions of one topic
SHARED_TOPICS, OWN_TOPICS = 2, 1  # that a token asks for: of the block's, of its own
KEY_STRENGTH, QUERY_STRENGTH = 0.7, 2.0


class Topics:
    """Directions of the topics of each layer and kv head, and of the segments of a prefix."""

    def __init__(self, backend: CudaBackend, prefix: int, seed: int = 0) -> None:
        self.backend, self.prefix = backend, prefix
        self._random = cupy.random.RandomState(seed)
        self._segments = -(-prefix // SEGMENT)

    def _directions(self, layer: int) -> Any:
        c = self.backend.config
        random = cupy.random.RandomState(1000 + layer)
        return random.standard_normal((self._segments, c.num_kv_heads, c.head_dim), np.float32)

    def cache(self, room: int) -> Any:
        """A cache that holds the prefix in all layers."""
        c = self.backend.config

        def draw(layer: int, start: int, count: int) -> tuple[Any, Any]:
            segments = (start + cupy.arange(count)) // SEGMENT
            shape = (count, c.num_kv_heads, c.head_dim)
            keys = self._random.standard_normal(shape, np.float32)
            keys += np.float32(KEY_STRENGTH) * self._directions(layer)[segments]
            return keys, self._random.standard_normal(shape, np.float32)

        return written_cache(self.backend, self.prefix, room, draw)

    def queries(self, layer: int, tokens: int, passes: int, changed: int = 3) -> list[Any]:
        """Queries of a block in consecutive passes, [tokens, heads, head_dim]."""
        c = self.backend.config
        rng = np.random.default_rng(layer)
        with self.backend.memory.stream:
            directions = self._directions(layer)
            noise = self._random.standard_normal((tokens, c.num_heads, c.head_dim), np.float32)

            def aim(rows: int) -> Any:
                shared = rng.integers(self._segments, size=(1, c.num_kv_heads, SHARED_TOPICS))
                own = rng.integers(self._segments, size=(rows, c.num_kv_heads, OWN_TOPICS))
                topics = np.concatenate([np.broadcast_to(shared, (rows, *shared.shape[1:])), own], axis=2)
                heads = cupy.arange(c.num_kv_heads)[None, :, None]
                sums = directions[cupy.asarray(topics), heads].sum(axis=2)
                return np.float32(QUERY_STRENGTH) * cupy.repeat(sums, c.group_size, axis=1)

            base = aim(tokens)
            result = []
            for _ in range(passes):
                moved = cupy.asarray(rng.choice(tokens, min(changed, tokens), replace=False))
                base = base.copy()
                base[moved] = aim(len(moved))
                small = self._random.standard_normal(noise.shape, np.float32) * np.float32(0.05)
                result.append(base + noise + small)
        return result

"""The queries of a pass, which only its attention sees."""

from __future__ import annotations

from typing import Any

import numpy as np

from losart.attention import POLICIES, DensePolicy
from losart.config.options import AttentionConfig
from losart.engine.batch import PassKind
from losart.measure.bench import BlockPasses


class ListeningPolicy(DensePolicy):
    """Dense attention that copies each layer's queries of the last pass to the host."""

    queries: list[np.ndarray]

    def key(self, kind: PassKind) -> None:
        return None  # a replayed pass would not call `attend`

    def attend(self, backend: Any, layer: int, q: Any, *rest: Any) -> Any:
        on_host = q if isinstance(q, np.ndarray) else q.get()
        self.queries = [on_host] if layer == 0 else [*self.queries, on_host]
        return super().attend(backend, layer, q, *rest)


POLICIES["listening"] = ListeningPolicy
LISTENING = AttentionConfig("listening")


def queries_of(transformer: Any, passes: BlockPasses) -> list[np.ndarray]:
    """Queries [tokens, heads, head_dim] of all layers in a pass with the attention LISTENING."""
    batch = passes.batch(PassKind.FIRST)
    transformer.forward(batch)
    return transformer.policy(batch.options).queries

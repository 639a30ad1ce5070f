"""Prefixes whose keys answer a block's queries, for whole passes with concentrated attention.

The queries of a whole pass come out of random weights, so it is keys that are made to fit. The prefix is
noise (standard normal, so that scores are too) but for some segments of 128 positions: in each layer
and kv head a few that all tokens of the block ask for, and one for each token, as in `topics.py`.
To the noise of a segment's keys the shortest vector is added whose score with all those queries is
`SCORE`. Planted segments then get about nine tenths of the attention over a prefix of 128K.

Planting goes layer by layer, since what a layer reads decides what the next ones ask for. The block
has two states, which differ in a few tokens as those of consecutive passes do; both are planted for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cupy
import numpy as np

from benchmarks.cuda.model import LaterPasses, NoiseModel
from benchmarks.cuda.noise import BLOCK, block_options, pass_after, written_cache
from benchmarks.cuda.topics import OWN_TOPICS, SEGMENT, SHARED_TOPICS
from benchmarks.support.attempts import attempt
from benchmarks.support.queries import LISTENING, queries_of
from losart.backends.base import PassBody
from losart.backends.cuda.batch import DeviceBatch
from losart.config.options import AttentionConfig
from losart.config.precision import GROUP_PAGES
from losart.engine.batch import PassKind
from losart.measure.bench import BlockPasses

SCORE = 8.0  # of planted keys, above those of the noise, whose standard deviation is 1
GROUP = GROUP_PAGES * AttentionConfig().page_size  # positions whose bounds are coded together
RIDGE = 1e-4  # of the sum of the queries' squares
CHANGED = 2  # tokens in which the block's states differ


class PlantedPrefix:
    """A cache whose keys answer the queries of two states of the block after it.

    Parameters
    ----------
    model : NoiseModel
    prefix : int

    Attributes
    ----------
    model : NoiseModel
    cache : PagedKVCache
    blocks : list of int64 [BLOCK]
        The states of the block.
    """

    def __init__(self, model: NoiseModel, prefix: int) -> None:
        self.model = model
        self._random = cupy.random.RandomState(0)
        self.cache = written_cache(
            model.backend,
            prefix,
            BLOCK,
            lambda _layer, _start, count: (self._noise(count), self._noise(count)),
        )
        rng = np.random.default_rng(0)
        before, others = rng.choice(model.config.vocab_size, (2, BLOCK), replace=False)
        changed = np.arange(BLOCK) >= BLOCK - CHANGED
        self.blocks = [before, np.where(changed, others, before)]
        for layer in range(model.config.num_layers):
            first, second = (self._queries(ids)[layer] for ids in self.blocks)
            queries = np.concatenate([first, second[changed]])
            shared, own = self._answer(queries), [self._answer(queries[[n]]) for n in range(len(queries))]
            vectors = [shared] * SHARED_TOPICS + own * OWN_TOPICS
            groups = rng.choice(prefix // GROUP, len(vectors), replace=False)
            for group, vector in zip(groups, vectors, strict=True):
                self._plant(layer, (int(group) + 1) * GROUP - SEGMENT, vector)

    def passes(self, attention: AttentionConfig) -> LaterPasses:
        """Passes of a method over the block, whose states take turns."""
        return LaterPasses(self.model, self.cache, self.blocks, attention)

    def _noise(self, count: int) -> Any:
        c = self.model.config
        return self._random.standard_normal((count, c.num_kv_heads, c.head_dim), np.float32)

    def _queries(self, ids: np.ndarray) -> list[np.ndarray]:
        """Queries [BLOCK, heads, head_dim] of all layers in a dense pass."""
        transformer, options = self.model.transformer, block_options(self.model.config, LISTENING)
        return queries_of(transformer, BlockPasses(transformer, self.cache, options, lambda: ids))

    def _answer(self, queries: np.ndarray) -> np.ndarray:
        """For each kv head the shortest vector [kv_heads, head_dim] with about SCORE for its queries.

        `queries` are [tokens, heads, head_dim]. The ridge keeps the vector short where they are much alike.
        """
        c = self.model.config
        by_head = queries.reshape(-1, c.num_kv_heads, c.group_size, c.head_dim).transpose(1, 0, 2, 3)
        rows = by_head.reshape(c.num_kv_heads, -1, c.head_dim)
        gram = rows @ rows.transpose(0, 2, 1)
        gram += RIDGE * gram.trace(axis1=1, axis2=2)[:, None, None] * np.eye(gram.shape[1], dtype=np.float32)
        scores = np.full((*rows.shape[:2], 1), SCORE * c.head_dim**0.5, np.float32)
        return (rows * np.linalg.solve(gram, scores)).sum(axis=1)

    def _plant(self, layer: int, start: int, vector: np.ndarray) -> None:
        """Rewrite a segment, the last one of a group of pages, whose bounds are then coded anew."""
        cache, length, backend = self.cache, self.cache.length, self.model.backend

        def write(batch: DeviceBatch) -> Any:
            keys = self._noise(SEGMENT)
            keys += cupy.asarray(vector)
            backend.write_kv(layer, keys, self._noise(SEGMENT), batch)
            return None, []

        cache.length = start
        backend.begin(pass_after(cache, SEGMENT, PassKind.PREFILL), PassBody(write))()
        cache.length = length


def planted_rows(
    size: str,
    prefixes: Sequence[int],
    rows_of: Callable[[PlantedPrefix], Iterator[dict[str, Any]]],
    weights: str = "bfloat16",
) -> Iterator[dict[str, Any]]:
    """Rows of a size at some prefixes, of one model; where one of them cannot be made, the reason."""
    model = attempt(lambda: NoiseModel(size, weights=weights))
    for prefix in prefixes:
        row = {"size": size, "prefix": prefix} | ({} if weights == "bfloat16" else {"weights": weights})
        planted = model if isinstance(model, str) else attempt(PlantedPrefix, model, prefix)
        if isinstance(planted, str):
            yield row | {"failed": planted}
        else:
            for measured in rows_of(planted):
                yield row | measured

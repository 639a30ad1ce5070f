"""Our model of SDAR's sizes with noise for weights, and an attention method's passes over a block of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.cuda.noise import NoiseBackend, block_options, held_bytes, model_config, shapes
from benchmarks.cuda.timing import run_microseconds
from losart.backends.base import ExpertWeights
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig
from losart.config.precision import Precision
from losart.engine.batch import PassBatch, PassKind, PassResult
from losart.engine.kv_cache import PagedKVCache
from losart.measure.bench import BlockPasses
from losart.models.transformer import Transformer


class NoiseModel:
    """A model of a size.

    Parameters
    ----------
    size : str or ModelConfig
        Of `random_checkpoint.SIZES`.
    transformer : type
        Transformer, or a class made of it.
    deterministic : bool
        As of `losart.load`.
    weights : str
        As of NoiseBackend.
    kv, activations : str
        As of `losart.load`.
    """

    def __init__(
        self,
        size: str | ModelConfig,
        transformer: type[Transformer] = Transformer,
        deterministic: bool = False,
        weights: str = "bfloat16",
        kv: str = "auto",
        activations: str = "auto",
    ) -> None:
        self.config = model_config(size) if isinstance(size, str) else size
        precision = Precision.of("bfloat16", kv, activations)
        self.backend = NoiseBackend(self.config, precision, deterministic, weights)
        self.transformer: Any = transformer(self.config, shapes(self.config), self.backend)

    @property
    def read_bytes(self) -> int:
        """Of all weights that a pass may have to read: of the embedding it reads only a few rows."""
        matrices = []
        for layer in self.transformer.layers:
            matrices += [layer.qkv, layer.o, layer.feed_forward.gate_up, layer.feed_forward.down]
            if isinstance(layer.feed_forward, ExpertWeights):
                matrices.append(layer.feed_forward.router)
        return sum(map(held_bytes, [*matrices, self.transformer.head]))


@dataclass(frozen=True)
class PassTime:
    """A pass: when it began and ended, by `time.perf_counter`, and what it was."""

    began: float
    ended: float
    kind: PassKind
    rides: bool
    rows: int
    caches: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class TimedTransformer(Transformer):
    """Notes the time of each pass, which is waited for, so that none is counted to the next."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.passes: list[PassTime] = []

    def begin(self, batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        backend: Any = self.backend
        began = time.perf_counter()
        finish = super().begin(batch, observe)
        caches = len({id(one.cache) for one in batch.sequences})
        what = batch.kind, batch.rides, batch.tokens, caches  # not the batch, which has them

        def timed() -> PassResult:
            result = finish()
            backend.memory.stream.synchronize()
            self.passes.append(PassTime(began, time.perf_counter(), *what))
            return result

        return timed


class LaterPasses(BlockPasses):
    """Passes over the block after a cache's prefix, of which the first one is made at once.

    Parameters
    ----------
    model : NoiseModel
    cache : PagedKVCache
    blocks : sequence of int64 [BLOCK]
        The block's ids, which take turns from pass to pass.
    attention : AttentionConfig
    """

    def __init__(
        self, model: NoiseModel, cache: PagedKVCache, blocks: Sequence[np.ndarray], attention: AttentionConfig
    ) -> None:
        ids = partial(next, itertools.cycle(blocks))
        super().__init__(model.transformer, cache, block_options(model.config, attention), ids)
        self._stream = model.backend.memory.stream
        self.run(PassKind.FIRST)

    def milliseconds(self) -> float:
        """Median of later passes, after those that compile and capture them."""
        return run_microseconds(self._stream, lambda: self.run(PassKind.LATER)) / 1e3

    @property
    def density(self) -> float:
        """Share of the prefix that later passes have read."""
        density = self.reads.sparse_density
        return 1.0 if density is None else density

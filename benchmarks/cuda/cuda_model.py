"""Our model of SDAR's sizes with noise for weights, and an attention method's passes over a block of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda_noise import NoiseBackend, Shapes, model_config
from cuda_timing import run_microseconds

from losart.attention import make_policy
from losart.attention.policy import AttentionPolicy, PassKind
from losart.backends.base import PassInputs
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig, generation_config
from losart.engine.kv_cache import PagedKVCache
from losart.models.transformer import Transformer

BLOCK = 16
Method = Callable[[AttentionConfig, ModelConfig, int], AttentionPolicy]


class NoiseModel:
    """A model of a size.

    Parameters
    ----------
    size : str
        Of `random_checkpoint.SIZES`.
    transformer : type
        Transformer, or a class made of it.
    """

    def __init__(self, size: str, transformer: type[Transformer] = Transformer) -> None:
        self.config = model_config(size)
        self.backend = NoiseBackend(self.config, "bfloat16")
        self.transformer: Any = transformer(self.config, Shapes(self.config), self.backend)


class BlockPasses:
    """Denoising passes over the block after a cache's prefix; the first one is made at once.

    Parameters
    ----------
    model : NoiseModel
    cache : PagedKVCache
    blocks : sequence of int64 [BLOCK]
        The block's ids, which take turns from pass to pass.
    attention : AttentionConfig
    method : callable, optional
        Makes the policy, as `make_policy` does.
    """

    def __init__(
        self,
        model: NoiseModel,
        cache: PagedKVCache,
        blocks: Sequence[np.ndarray],
        attention: AttentionConfig,
        method: Method = make_policy,
    ) -> None:
        self._model, self._cache, self._turns = model, cache, itertools.cycle(blocks)
        self._generation = generation_config(model.config, {"block_length": BLOCK})
        self._policy = method(attention, model.config, BLOCK)
        self._policy.begin_block()
        self._run(PassKind.FIRST)

    def _run(self, kind: PassKind) -> None:
        masked = np.arange(BLOCK)
        self._policy.begin_pass(kind, self._cache.length, masked)
        inputs = PassInputs(next(self._turns), masked, np.zeros(BLOCK))
        self._model.transformer.denoise(inputs, self._cache, self._policy, self._generation)

    def later(self) -> None:
        """A later pass, with proposals for all of the block."""
        self._run(PassKind.LATER)

    def later_milliseconds(self) -> float:
        """Median of later passes, after those that compile and capture it."""
        return run_microseconds(self._model.backend.stream, self.later) / 1e3

    @property
    def density(self) -> float:
        """Share of the prefix that later passes read, up to now."""
        density = self._policy.reads.sparse_density
        return 1.0 if density is None else density

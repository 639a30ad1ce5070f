"""Times of prefill and of denoising passes, on the device at hand.

On the CPU most of the prefix is white noise in place of keys and values, where prefilling it would
take long. Dense attention's time does not depend on it; for sparse attention noise is the worst
case, since every query then prefers other pages: the density beside a time says how much was read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from timeit import timeit
from typing import Any

import numpy as np

from losart.api.model import Model
from losart.config.model import ModelConfig
from losart.config.options import PAGE_UNIT, AttentionConfig, GenerationConfig, generation_config
from losart.engine.batch import PassBatch, PassKind, SequencePass
from losart.engine.engine import Engine
from losart.engine.kv_cache import PagedKVCache
from losart.engine.sequence import ReadLog
from losart.errors import OptionError
from losart.models.transformer import Transformer

CHANGED = 2  # tokens of the block that differ from pass to pass
PREFILLED = 256  # last tokens of the prefix that are always prefilled, and timed


@dataclass(frozen=True)
class PassTimes:
    """Medians of an attention method's passes over a block.

    Attributes
    ----------
    first_seconds, later_seconds : float
    density : float or None
        Share of the prefix that passes read that the method reads sparsely; None without such.
    """

    first_seconds: float
    later_seconds: float
    density: float | None


def check_prefix(model: ModelConfig, prefix: int, block_length: int) -> None:
    """See that a prefix is whole pages and blocks, and leaves room for a block.

    Raises
    ------
    OptionError
    """
    room, step = model.max_positions - block_length, math.lcm(PAGE_UNIT, block_length)
    if not (0 < prefix <= room and prefix % step == 0):
        raise OptionError(
            f"lengths must be multiples of {step}, of whole pages and blocks, up to {room}, not {prefix}"
        )


class NoiseBlocks:
    """Blocks of random ids after a prefix that means nothing.

    Parameters
    ----------
    model : Model
    prefix : int
        Positions of the prefix, whole pages of 16 and whole blocks.
    block_length : int

    Attributes
    ----------
    prefill_rate : float
        Prompt tokens a second, of the last 256 of the prefix or so, when they are prefilled a second time.

    Raises
    ------
    OptionError
        The prefix is not that, or the model has no positions for it.
    """

    def __init__(self, model: Model, prefix: int, block_length: int) -> None:
        check_prefix(model.config, prefix, block_length)
        self.engine: Engine = model._engine
        self.transformer: Any = self.engine.runner
        self.config = generation_config(model.config, {"block_length": block_length, "page_size": PAGE_UNIT})
        self.cache = self.transformer.new_cache(self.config, prefix + block_length)
        self._rng = np.random.default_rng(0)
        self._ids = self._random_ids(block_length)
        step = math.lcm(PAGE_UNIT, block_length)
        prefilled = min(prefix, -(-PREFILLED // step) * step)
        self._fill(prefix - prefilled)
        self._prefill(prefilled)  # compiles a GPU's kernels for so many tokens
        self.cache.length -= prefilled
        self.prefill_rate = prefilled / timeit(lambda: self._prefill(prefilled), number=1)

    def _random_ids(self, count: int) -> np.ndarray:
        return self._rng.integers(0, self.transformer.config.vocab_size, count)

    def _fill(self, tokens: int) -> None:
        if self.transformer.backend.name != "cpu":
            self._prefill(tokens)
            return
        model = self.transformer.config
        self.cache.reserve(tokens)
        for layer in range(model.num_layers):
            self.cache.table.write(layer, 0, *noise((tokens, model.num_kv_heads, model.head_dim), layer))
        self.cache.advance(tokens)

    def _prefill(self, tokens: int) -> None:
        # What the cache holds already needs ids too; they are not looked at.
        prompt = [*[0] * self.cache.length, *self._random_ids(tokens).tolist()]
        self.engine.prefill(self.engine.sequence(prompt, self.config, self.cache))

    def pass_times(self, attention: AttentionConfig, repeats: int) -> PassTimes:
        """Time the first and a later pass of this many blocks, after one block that does not count."""
        passes = self.passes(attention)

        def seconds(kind: PassKind) -> float:
            return timeit(lambda: passes.run(kind), number=1)

        times = [(seconds(PassKind.FIRST), seconds(PassKind.LATER)) for _ in range(repeats + 1)]
        first, later = (statistics.median(column) for column in zip(*times[1:], strict=True))
        return PassTimes(first, later, passes.reads.sparse_density)

    def passes(self, attention: AttentionConfig) -> BlockPasses:
        """Denoising passes over a block, with these attention options."""
        options = replace(self.config, attention=attention)
        return BlockPasses(self.transformer, self.cache, options, self.changed_ids)

    def changed_ids(self) -> np.ndarray:
        """The block's ids, of which a few differ from those of the call before."""
        tokens = len(self._ids)
        changed = min(CHANGED, tokens)
        self._ids[self._rng.choice(tokens, changed, replace=False)] = self._random_ids(changed)
        return self._ids.copy()


@dataclass(eq=False)
class BlockPasses:
    """Denoising passes over the block after a cache's prefix, with proposals for all of it.

    Parameters
    ----------
    transformer : Transformer
    cache : PagedKVCache
    options : GenerationConfig
    ids : callable
        Called for the block's ids of each pass: int64 [block_length].

    Attributes
    ----------
    reads : ReadLog
    """

    transformer: Transformer
    cache: PagedKVCache
    options: GenerationConfig
    ids: Callable[[], np.ndarray]

    def __post_init__(self) -> None:
        self._slot = self.transformer.new_slot(self.options)
        self.reads = ReadLog(self.options.block_length)

    def batch(self, kind: PassKind) -> PassBatch:
        """The next pass, of this kind."""
        tokens, length = self.options.block_length, self.cache.length
        self.cache.reserve(length + tokens)
        request = SequencePass(
            *(kind, self.ids().tolist(), length, self.options, self.cache, self._slot),
            masked=list(range(tokens)),
        )
        return PassBatch((request,))

    def run(self, kind: PassKind) -> None:
        """Run the next pass."""
        result = self.transformer.forward(self.batch(kind))
        self.reads.add(result.reads[0], self.cache.length, self.transformer.config.num_kv_heads)


def noise(shape: tuple[int, int, int], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of one layer, [prefix, kv_heads, head_dim]."""
    rng = np.random.default_rng(layer)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)

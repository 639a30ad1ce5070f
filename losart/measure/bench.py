"""Times of prefill and of denoising passes, on the device at hand.

On the CPU most of the prefix is white noise in place of keys and values, where prefilling it would
take long. Dense attention's time does not depend on it; for sparse attention noise is the worst
case, since every query then prefers other pages: the density beside a time says how much was read.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from losart.api.model import Model
from losart.attention import make_policy
from losart.attention.policy import AttentionPolicy, PassKind
from losart.backends.base import PassInputs
from losart.config.checks import require
from losart.config.model import ModelConfig
from losart.config.options import PAGE_UNIT, AttentionConfig, generation_config
from losart.engine.decode import prefill
from losart.errors import OptionError

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
    require(
        0 < prefix <= room and prefix % step == 0,
        OptionError,
        f"lengths must be multiples of {step}, of whole pages and blocks, up to {room}, not {prefix}",
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
        Prompt tokens a second, of the last 256 of the prefix or of all where it is shorter.

    Raises
    ------
    OptionError
        The prefix is not that, or the model has no positions for it.
    """

    def __init__(self, model: Model, prefix: int, block_length: int) -> None:
        check_prefix(model.config, prefix, block_length)
        self.transformer = model._transformer
        self.config = generation_config(model.config, {"block_length": block_length})
        self.block_length = block_length
        self.cache = self.transformer.backend.new_cache(PAGE_UNIT, prefix + block_length)
        self._rng = np.random.default_rng(0)
        self._ids = self._random_ids(block_length)
        step = math.lcm(PAGE_UNIT, block_length)
        prefilled = min(prefix, -(-PREFILLED // step) * step)
        self._fill(prefix - prefilled)
        self.prefill_rate = prefilled / _seconds(lambda: self._prefill(prefilled))

    def _random_ids(self, count: int) -> np.ndarray:
        return self._rng.integers(0, self.transformer.config.vocab_size, count)

    def _fill(self, tokens: int) -> None:
        if self.transformer.backend.name != "cpu":
            self._prefill(tokens)
            return
        model = self.transformer.config
        for layer in range(model.num_layers):
            self.cache.write(layer, *noise((tokens, model.num_kv_heads, model.head_dim), layer))
        self.cache.advance(tokens)

    def _prefill(self, tokens: int) -> None:
        prefill(self.transformer, self._random_ids(tokens), self.cache, self.block_length)

    def later_policy(self, attention: AttentionConfig) -> AttentionPolicy:
        """A policy that has seen the first pass of a block; the passes that follow are later ones."""
        policy = make_policy(attention, self.transformer.config, self.block_length)
        self._first_pass(policy)
        self._begin(policy, PassKind.LATER)
        return policy

    def _first_pass(self, policy: AttentionPolicy) -> None:
        policy.begin_block()
        self._begin(policy, PassKind.FIRST)
        self.denoising_pass(policy)

    def _begin(self, policy: AttentionPolicy, kind: PassKind) -> None:
        policy.begin_pass(kind, self.cache.length, np.arange(self.block_length))

    def denoising_pass(self, policy: AttentionPolicy) -> None:
        """A pass over a block of which a few tokens changed, and proposals for all of it."""
        changed = min(CHANGED, self.block_length)
        self._ids[self._rng.choice(self.block_length, changed, replace=False)] = self._random_ids(changed)
        inputs = PassInputs(self._ids, np.arange(self.block_length), np.zeros(self.block_length))
        self.transformer.denoise(inputs, self.cache, policy, self.config)

    def pass_times(self, attention: AttentionConfig, repeats: int) -> PassTimes:
        """Time the first and a later pass of this many blocks, after one block that does not count."""
        policy = make_policy(attention, self.transformer.config, self.block_length)

        def later() -> None:
            self._begin(policy, PassKind.LATER)
            self.denoising_pass(policy)

        times = [(_seconds(lambda: self._first_pass(policy)), _seconds(later)) for _ in range(repeats + 1)]
        first, later_ = (statistics.median(seconds) for seconds in zip(*times[1:], strict=True))
        return PassTimes(first, later_, policy.reads.sparse_density)


def noise(shape: tuple[int, int, int], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of one layer, [prefix, kv_heads, head_dim]."""
    rng = np.random.default_rng(layer)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began

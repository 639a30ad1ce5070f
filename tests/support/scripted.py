"""In a transformer's place: what an engine asks of one, without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from losart.config.options import GenerationConfig
from losart.engine.batch import PassBatch, PassResult
from losart.engine.kv_pool import KVPool
from losart.engine.turns import Turns


class Cache:
    """A cache without keys and values."""

    name = -1
    length = reserved = nbytes = shared_bytes = 0
    positions_per_chunk = 256

    def reserve(self, positions: int) -> None:
        self.reserved = positions

    def advance(self, tokens: int) -> None:
        self.length += tokens


@dataclass(kw_only=True)
class Scripted:
    """A runner whose passes are a test's own `forward`."""

    config: Any
    prefill_tokens: int
    beside_tokens: int
    batch_rows: int
    max_sequences: int = 16
    rides: bool = False
    kv: str = "float32"
    matrix_bytes: dict[str, int] = field(default_factory=dict)
    deterministic: bool = False
    same_sums: bool = False
    slots: int = 0  # so far
    turns: Turns = field(default_factory=Turns)
    pools: set[KVPool] = field(default_factory=set)

    def check(self, options: GenerationConfig) -> None:
        pass

    def commits_ride(self, options: GenerationConfig) -> bool:
        return self.rides

    def new_cache(self, options: GenerationConfig, expected: int) -> Cache:
        return Cache()

    def new_slot(self, options: GenerationConfig) -> int:
        self.slots += 1
        return self.slots

    def begin(self, batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        result = self.forward(batch, observe)
        return lambda: result

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        raise NotImplementedError

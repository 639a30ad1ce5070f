"""What an engine asks of what runs its passes."""

from __future__ import annotations

from collections.abc import Callable, MutableSet
from typing import Any, Protocol

from losart.config.model import ModelConfig
from losart.config.options import GenerationConfig
from losart.engine.batch import PassBatch, PassResult
from losart.engine.kv_cache import PagedKVCache
from losart.engine.kv_pool import KVPool
from losart.engine.turns import Turns


class Runner(Protocol):
    """What runs passes: a transformer on a backend."""

    config: ModelConfig
    turns: Turns  # in which its passes are run
    pools: MutableSet[KVPool]  # whose prefixes make room where an allocation fails
    matrix_bytes: dict[str, int]  # what weights take, by format

    @property
    def kv(self) -> str:
        """The format in which keys and values are held."""

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that go through the model at a time, about."""

    @property
    def beside_tokens(self) -> int:
        """The same while other sequences wait for their passes."""

    @property
    def deterministic(self) -> bool:
        """Whether a sequence must not depend, not even by rounding, on what it shares."""

    @property
    def same_sums(self) -> bool:
        """Whether that is so of passes over blocks."""

    @property
    def max_sequences(self) -> int:
        """That share passes, unless somebody says otherwise."""

    @property
    def batch_rows(self) -> int:
        """Rows that a pass over several sequences may have; 0: a pass has one sequence."""

    def commits_ride(self, options: GenerationConfig) -> bool:
        """Whether a pass commits a block and begins the next one."""

    def check(self, options: GenerationConfig) -> None:
        """Raise OptionError where the options do not go together."""

    def new_cache(self, options: GenerationConfig, expected: int) -> PagedKVCache:
        """An empty KV cache, expected to hold so many positions in the end."""

    def new_slot(self, options: GenerationConfig) -> Any:
        """Room for a sequence's stored results; None where its attention method stores none."""

    def begin(self, batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        """Launch one pass; the function returned waits for its result, before the next is begun."""

"""What an attention policy is: how each layer of each pass reads the prefix."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from losart.attention.reads import ReadLog
from losart.backends.base import Memory, Prefix
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig
from losart.engine.kv_cache import PagedKVCache


class PassKind(enum.Enum):
    """The passes over a block, in their order."""

    FIRST = "first"
    LATER = "later"
    COMMIT = "commit"


class AttentionPolicy(ABC):
    """Attention of one generation's blocks; made anew for each generation.

    A pass is dense, whatever the method, in the first `dense_layers` layers, when it commits a block
    with `commit="dense"`, and when it is a block's first with `first_pass="dense"`. All other prefix
    attention is the method's own, `prefix`, and so is a first pass that a method keeps something of.

    Parameters
    ----------
    config : AttentionConfig
    model : ModelConfig
    block_length : int

    Attributes
    ----------
    reads : ReadLog
        What the passes have read so far.
    masked : int32 [any]
        Positions of the block that are masked in this pass, rising.
    memory : Memory, optional
        For what one pass leaves for another.
    """

    dense_first_pass = False  # with first_pass="auto"
    keeps = False  # whether a pass finds what an earlier one left

    def __init__(self, config: AttentionConfig, model: ModelConfig, block_length: int) -> None:
        self.config = config
        self.model = model
        self.block_length = block_length
        self.kind = PassKind.FIRST
        self.masked = np.empty(0, np.int32)
        self.memory: Memory | None = None
        self.reads = ReadLog(model.num_kv_heads, block_length)

    def begin_block(self) -> None:
        """A new block: nothing stored of an earlier one is valid."""
        self.kind = PassKind.FIRST

    def begin_pass(self, kind: PassKind, prefix_length: int, masked: np.ndarray | Sequence[int] = ()) -> None:
        """A pass over all layers begins.

        Parameters
        ----------
        kind : PassKind
        prefix_length : int
        masked : int [any]
            Positions of the block that are still masked, rising; none in a commit pass.
        """
        self.kind = kind
        self.masked = np.asarray(masked, np.int32)
        layers, dense = self.model.num_layers, self._dense_pass()
        dense_layers = layers if dense else min(self.config.dense_layers, layers)
        self.reads.begin_pass(not dense, prefix_length, dense_layers, layers - dense_layers)

    def end_pass(self, positions: int) -> None:
        """The pass is over.

        Parameters
        ----------
        positions : int
            Prefix positions that sparse attention read, summed over kv heads and layers.
        """
        self.reads.end_pass(positions, self._readers)

    @property
    def _readers(self) -> int:
        """Tokens that read the prefix in a sparse layer of this pass."""
        return self.block_length

    @property
    def shape(self) -> Hashable:
        """What a pass of this kind has in common with others that launch the same operations.

        `masked` is no part of it: what depends on it is an input of those operations.
        """
        key = None if self.memory is None else self.memory.key
        return type(self), self.config, self.kind, self.block_length, key

    def use(self, backend: Any) -> None:
        """Be ready for passes on this backend."""
        if self.keeps and self.memory is None:
            self.memory = backend.new_memory((type(self), self.config, self.block_length))

    def kept(self, layer: int, name: str) -> Any:
        """What an earlier pass over the block left in a layer under this name."""
        assert self.memory is not None
        return self.memory.arrays[layer, name]

    def _dense_pass(self) -> bool:
        config = self.config
        if self.kind is PassKind.COMMIT:
            return config.commit == "dense"
        dense_first = self.dense_first_pass if config.first_pass == "auto" else config.first_pass == "dense"
        return self.kind is PassKind.FIRST and dense_first

    def attend(self, backend: Any, layer: int, q: Any, k: Any, v: Any, cache: PagedKVCache) -> Any:
        """Attention of the block's tokens over prefix and block.

        Parameters
        ----------
        backend : Backend
        layer : int
        q : [tokens, heads, head_dim]
            The policy may keep it, and write into it in later passes.
        k, v : [tokens, kv_heads, head_dim]
            Of the block itself.
        cache : PagedKVCache
            The prefix.

        Returns
        -------
        [tokens, heads, head_dim]
        """
        own = self.kind is PassKind.LATER or (self.kind is PassKind.FIRST and self.keeps)
        if layer < self.config.dense_layers or (self._dense_pass() and not own):
            prefix = backend.prefix_attention(q, cache, layer)
        else:
            prefix = self.prefix(backend, layer, q, cache)
        return backend.block_attention(q, k, v, prefix)

    @abstractmethod
    def prefix(self, backend: Any, layer: int, q: Any, cache: PagedKVCache) -> Prefix:
        """The method's prefix attention, as the backend gives it."""

"""What an attention policy is: how each layer of each pass reads the prefix."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from losart.backends.base import Prefix, Selection, StoredResults
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig
from losart.engine.batch import PassKind, PassReads
from losart.errors import OptionError

POLICIES: dict[str, type[AttentionPolicy]] = {}  # by method; losart.attention fills it


class AttentionPolicy:
    """Says which operations run; holds nothing of a generation.

    A pass is dense, whatever the method, in the first `dense_layers` layers, when it commits a block
    with `commit="dense"`, and when it is a block's first with `first_pass="dense"`. All other prefix
    attention is the method's own, `prefix`, and so is a first pass of which a method stores something.

    Parameters
    ----------
    config : AttentionConfig
    model : ModelConfig
    block_length : int
    """

    always_dense = False
    dense_first_pass = False  # with first_pass="auto"

    def __init__(self, config: AttentionConfig, model: ModelConfig, block_length: int) -> None:
        self.config = config
        self.model = model
        self.block_length = block_length

    @property
    def stored(self) -> StoredResults | None:
        """What passes over a block store for later ones."""
        return None

    @property
    def commits_ride(self) -> bool:
        """Whether a commit can ride with the first pass over the next block: both are dense."""
        return self.is_dense(PassKind.COMMIT) and self.is_dense(PassKind.FIRST)

    def attend(
        self, backend: Any, layer: int, q: Any, k: Any, v: Any, batch: Any
    ) -> tuple[Any, Selection | None]:
        """Attention of the blocks' tokens over their prefixes and blocks.

        Parameters
        ----------
        backend : Backend
        layer : int
        q : [tokens, heads, head_dim]
        k, v : [tokens, kv_heads, head_dim]
            Of the blocks themselves.
        batch : Batch

        Returns
        -------
        o : [tokens, heads, head_dim]
        selection : Selection or None
            What was read of the prefix; None: all, for all tokens.
        """
        if layer < self.config.dense_layers or not self._is_own(batch.kind):
            prefix, selection = backend.prefix_attention(layer, q, batch), None
        else:
            prefix, selection = self.prefix(backend, layer, q, batch)
        return backend.block_attention(q, k, v, prefix, batch), selection

    def prefix(self, backend: Any, layer: int, q: Any, batch: Any) -> tuple[Prefix, Selection | None]:
        """The method's prefix attention, and what it read."""
        return backend.prefix_attention(layer, q, batch), None

    def is_dense(self, kind: PassKind) -> bool:
        """Whether passes of a kind read the whole prefix in all layers."""
        config = self.config
        if self.always_dense or kind is PassKind.LATER:
            return self.always_dense
        if kind is PassKind.COMMIT:
            return config.commit == "dense"
        return self.dense_first_pass if config.first_pass == "auto" else config.first_pass == "dense"

    def _is_own(self, kind: PassKind) -> bool:
        """Whether passes of a kind are the method's own, in layers that are not dense."""
        return not self.is_dense(kind) or (kind is PassKind.FIRST and self.stored is not None)

    def key(self, kind: PassKind) -> Hashable:
        """What passes that launch the same operations have in common.

        Which tokens are masked and how long the prefix is are no part of it: operations read that from the
        batch. None for a pass in which the host takes part, which cannot be replayed.
        """
        if self.always_dense:
            return type(self), self.block_length
        if self.config.planner == "host" and not self.is_dense(kind):
            return None
        return self  # by identity, which is quicker to hash than all of its options

    def reads(self, kind: PassKind, positions: int, tokens: int) -> PassReads:
        """What a pass read of a sequence's prefix, in its sparse layers `positions` for `tokens`."""
        layers, dense = self.model.num_layers, self.is_dense(kind)
        dense_layers = layers if dense else min(self.config.dense_layers, layers)
        return PassReads(not dense, dense_layers, layers - dense_layers, positions, tokens)


def make_policy(config: AttentionConfig, model: ModelConfig, block_length: int) -> AttentionPolicy:
    """The policy of these options.

    Raises
    ------
    OptionError
        When `config.method` names none, or the method does not go with another option.
    """
    if config.method not in POLICIES:
        raise OptionError(f"attention must be one of {', '.join(POLICIES)}, not {config.method!r}")
    return POLICIES[config.method](config, model, block_length)

"""Immutable configuration of a model, validated once, when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from losart.config.checks import is_int, is_number
from losart.config.decoding import Decoding
from losart.config.precision import DTYPES
from losart.config.rope import RopeConfig, rotated_channels
from losart.errors import ConfigError


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of a feed-forward.

    A token's scores are the softmax, or each the sigmoid, of its router logits. It goes to the experts of
    highest score, of equal ones the earlier; with a bias, of highest score plus bias. With groups of
    neighbouring experts only those groups count whose two highest are the highest in sum.

    Attributes
    ----------
    count, per_token : int
        Experts of a layer, and those that a token goes to.
    intermediate_size : int
        Width of an expert.
    scores : {"softmax", "sigmoid"}
    normalize : bool
        Whether a token's weights, which are scores without bias, are divided by their sum.
    bias : bool
        Whether a bias is added to scores for the choice.
    groups, kept_groups : int
        Groups of experts, and those that a token chooses from.
    scaling : float
        A factor of all weights.
    shared : int
        Further experts that every token goes to, with weight 1.
    dense_layers : frozenset of int
        Layers that have a feed-forward all the same.
    """

    count: int
    per_token: int
    intermediate_size: int
    scores: str = "softmax"
    normalize: bool = True
    bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    scaling: float = 1.0
    shared: int = 0
    dense_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "intermediate_size", "groups", "kept_groups"):
            value = getattr(self, name)
            if not is_int(value) or value <= 0:
                raise ConfigError(f"experts: {name} must be a positive integer, not {value!r}")
        if self.scores not in ("softmax", "sigmoid"):
            raise ConfigError(f"experts: scores must be softmax or sigmoid, not {self.scores!r}")
        if not (is_int(self.shared) and self.shared >= 0):
            raise ConfigError(f"experts: shared must be an integer, 0 or more, not {self.shared!r}")
        if not is_number(self.scaling) or not math.isfinite(self.scaling):
            raise ConfigError(f"experts: scaling must be a number, not {self.scaling!r}")
        if self.count % self.groups or self.kept_groups > self.groups:
            raise ConfigError(
                f"experts: {self.count} experts cannot be in {self.groups} groups of which "
                f"{self.kept_groups} are kept"
            )
        if self.groups > 1 and self.count // self.groups < 2:
            raise ConfigError(f"experts: groups of {self.count // self.groups} have no two highest scores")
        if self.per_token > self.count // self.groups * self.kept_groups:
            raise ConfigError(
                f"experts: {self.per_token} per token are more than the "
                f"{self.count // self.groups * self.kept_groups} that it chooses from"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and parts of a block-diffusion transformer.

    Attributes
    ----------
    intermediate_size : int
        Width of the feed-forward.
    head_norms : bool
        Whether queries and keys are RMS-normed per head.
    qkv_bias, o_bias : bool
        Whether the q, k and v projections have biases; whether the o projection has.
    experts : ExpertsConfig or None
    tie_embeddings : bool
        Whether the output projection is the embedding.
    decoding : Decoding
    block_length, mask_token_id : int or None
        None where the checkpoint does not specify it.
    end_token_ids : tuple of int
        Tokens that end a generation; empty where the checkpoint specifies none.
    dtype : {"float32", "bfloat16", "float16"} or None
        Of the saved weights; None where the checkpoint's configuration does not specify it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    head_norms: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    experts: ExpertsConfig | None = None
    tie_embeddings: bool = False
    decoding: Decoding = field(default_factory=Decoding)
    block_length: int | None = None
    mask_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"]
        sizes += ["num_kv_heads", "head_dim", "max_positions"]
        if self.block_length is not None:
            sizes.append("block_length")
        for name in sizes:
            value = getattr(self, name)
            if not is_int(value) or value <= 0:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, not {self.head_dim}")
        rotated_channels(self.rope, self.head_dim)
        if not is_number(self.rms_norm_eps) or not 0 < self.rms_norm_eps < 1:
            raise ConfigError(f"rms_norm_eps must be a number above 0 and below 1, not {self.rms_norm_eps!r}")
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype {self.dtype!r} is not supported; supported: {', '.join(DTYPES)}")
        if self.block_length is not None and self.block_length > self.max_positions:
            raise ConfigError(
                f"block_length ({self.block_length}) must not be more than max_positions "
                f"({self.max_positions})"
            )
        mask = () if self.mask_token_id is None else (self.mask_token_id,)
        for token in (*self.end_token_ids, *mask):
            if not is_int(token) or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"token id {token!r} of the configuration is outside the vocabulary of {self.vocab_size}"
                )

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of a layer; None where it has a feed-forward."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    @property
    def expert_layers(self) -> int:
        """Layers that have experts."""
        return sum(self.experts_of(layer) is not None for layer in range(self.num_layers))

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

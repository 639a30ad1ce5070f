"""Immutable configuration of a model, validated once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from losart.config.checks import is_int, is_number
from losart.config.precision import DTYPES
from losart.config.rope import RopeConfig
from losart.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and parts of a block-diffusion transformer.

    Attributes
    ----------
    attention_bias : bool
        Whether the q, k, v, and o projections have biases.
    tie_embeddings : bool
        Whether the output projection is the embedding.
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
    attention_bias: bool = False
    tie_embeddings: bool = False
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

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

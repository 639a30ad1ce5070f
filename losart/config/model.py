"""Immutable configuration of a model, validated once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from losart.config.checks import is_int, is_number, require
from losart.errors import ConfigError

ROPE_KINDS = ("default", "linear", "yarn", "llama3")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes
    ----------
    theta : float
        Base of the frequencies.
    kind : {"default", "linear", "yarn", "llama3"}
        Scaling of the frequencies to longer contexts.
    factor : float
        Scaling factor (all kinds but "default").
    original_max_positions : int or None
        Context length of pre-training (yarn, llama3).
    attention_factor : float or None
        yarn: factor on cos and sin; None computes it from `factor` (and the mscales).
    beta_fast, beta_slow, mscale, mscale_all_dim, truncate
        yarn (arXiv 2309.00071), as Hugging Face names them.
    low_freq_factor, high_freq_factor : float
        llama3.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        require(
            self.kind in ROPE_KINDS,
            ConfigError,
            f"rope type {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}",
        )
        for name in ("theta", "factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            require(
                is_number(value) and value > 0,
                ConfigError,
                f"rope {name} must be a positive number, not {value!r}",
            )
        if self.kind in ("yarn", "llama3"):
            original = self.original_max_positions
            require(
                original is not None and is_int(original) and original > 0,
                ConfigError,
                f"rope type {self.kind!r} needs original_max_position_embeddings, a positive "
                f"integer, not {original!r}",
            )
        if self.kind == "llama3":
            require(
                self.high_freq_factor > self.low_freq_factor,
                ConfigError,
                "rope high_freq_factor must be larger than low_freq_factor",
            )
        if self.kind == "yarn":
            self._check_yarn()

    def _check_yarn(self) -> None:
        require(
            self.attention_factor is None or (is_number(self.attention_factor) and self.attention_factor > 0),
            ConfigError,
            f"rope attention_factor must be a positive number, not {self.attention_factor!r}",
        )
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            require(
                value is None or (is_number(value) and value >= 0),
                ConfigError,
                f"rope {name} must be a number, 0 or more, not {value!r}",
            )
        require(
            self.beta_fast > self.beta_slow,
            ConfigError,
            f"rope beta_fast ({self.beta_fast}) must be larger than beta_slow ({self.beta_slow})",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a block-diffusion transformer (the Qwen3 architecture).

    Attributes
    ----------
    block_length, mask_token_id : int or None
        As the checkpoint says them; None where it does not.
    end_token_ids : tuple of int
        Tokens that end a generation; empty where the checkpoint names none.
    dtype : {"float32", "bfloat16", "float16"} or None
        In which the checkpoint says it was saved; None where it does not.
    attention_bias : bool
        Biases on the q, k, v and o projections.
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
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            require(
                is_int(value) and value > 0,
                ConfigError,
                f"{name} must be a positive integer, not {value!r}",
            )
        require(
            self.num_heads % self.num_kv_heads == 0,
            ConfigError,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        require(self.head_dim % 2 == 0, ConfigError, f"head_dim must be even, not {self.head_dim}")
        require(
            is_number(self.rms_norm_eps) and 0 < self.rms_norm_eps < 1,
            ConfigError,
            f"rms_norm_eps must be a number above 0 and below 1, not {self.rms_norm_eps!r}",
        )
        require(
            self.dtype in (None, *DTYPES),
            ConfigError,
            f"dtype {self.dtype!r} is not supported; supported: {', '.join(DTYPES)}",
        )
        if self.block_length is not None:
            require(
                is_int(self.block_length) and self.block_length > 0,
                ConfigError,
                f"block_length must be a positive integer, not {self.block_length!r}",
            )
            require(
                self.block_length <= self.max_positions,
                ConfigError,
                f"block_length ({self.block_length}) must not be more than max_positions "
                f"({self.max_positions})",
            )
        tokens = (
            self.end_token_ids if self.mask_token_id is None else (*self.end_token_ids, self.mask_token_id)
        )
        for token in tokens:
            require(
                is_int(token) and 0 <= token < self.vocab_size,
                ConfigError,
                f"token id {token!r} of the configuration is outside the vocabulary of {self.vocab_size}",
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

"""The supported model families, as data: tensor names, tensor shapes, the mask token.

To add a family, describe it here and put it into `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from losart.config.model import ModelConfig
from losart.errors import ConfigError


@dataclass(frozen=True)
class TensorPattern:
    """A tensor's canonical name, its name in the files, and its shape by the names of its dimensions.

    "{i}" in a name stands for the layer; :func:`_dimensions` gives the dimensions' sizes.
    """

    name: str
    source: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold: canonical name, name in the files, shape."""

    name: str
    source: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one `model_type` are laid out.

    Attributes
    ----------
    model : tuple of TensorPattern
        Tensors outside the layers.
    head : TensorPattern
        The output projection; absent when tied to the embedding, and then harmless where it is left.
    layer : tuple of TensorPattern
        Tensors of each layer.
    attention_biases : tuple of TensorPattern
        Those that each layer has when `attention_bias` is set.
    harmless : tuple of str
        Patterns (as in `fnmatch`) of names in the files that are left unread.
    mask_token_id : int
        Of the released checkpoints; serves where a checkpoint does not say.
    """

    model: tuple[TensorPattern, ...]
    head: TensorPattern
    layer: tuple[TensorPattern, ...]
    attention_biases: tuple[TensorPattern, ...]
    harmless: tuple[str, ...]
    mask_token_id: int

    def expected_tensors(self, config: ModelConfig) -> Iterator[ExpectedTensor]:
        """Every tensor that a checkpoint of `config` must hold, one after another."""
        size = _dimensions(config)

        def expected(pattern: TensorPattern, i: int | None = None) -> ExpectedTensor:
            shape = tuple(size[dimension] for dimension in pattern.shape)
            return ExpectedTensor(pattern.name.format(i=i), pattern.source.format(i=i), shape)

        for pattern in self.model:
            yield expected(pattern)
        if not config.tie_embeddings:
            yield expected(self.head)
        in_layer = self.layer + (self.attention_biases if config.attention_bias else ())
        for i in range(config.num_layers):
            for pattern in in_layer:
                yield expected(pattern, i)

    def is_harmless(self, source: str, config: ModelConfig) -> bool:
        """Whether a tensor of this name that no one asked for may be ignored."""
        if config.tie_embeddings and source == self.head.source:
            return True
        return any(fnmatchcase(source, pattern) for pattern in self.harmless)


def _dimensions(config: ModelConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "q": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "head_dim": config.head_dim,
    }


# SDAR and TraDo: Qwen3, trained to fill in masked blocks.
_SDAR = Family(
    model=(
        TensorPattern("embed", "model.embed_tokens.weight", ("vocab", "hidden")),
        TensorPattern("final_norm", "model.norm.weight", ("hidden",)),
    ),
    head=TensorPattern("head", "lm_head.weight", ("vocab", "hidden")),
    layer=(
        TensorPattern("layers.{i}.input_norm", "model.layers.{i}.input_layernorm.weight", ("hidden",)),
        TensorPattern("layers.{i}.q", "model.layers.{i}.self_attn.q_proj.weight", ("q", "hidden")),
        TensorPattern("layers.{i}.k", "model.layers.{i}.self_attn.k_proj.weight", ("kv", "hidden")),
        TensorPattern("layers.{i}.v", "model.layers.{i}.self_attn.v_proj.weight", ("kv", "hidden")),
        TensorPattern("layers.{i}.o", "model.layers.{i}.self_attn.o_proj.weight", ("hidden", "q")),
        TensorPattern("layers.{i}.q_norm", "model.layers.{i}.self_attn.q_norm.weight", ("head_dim",)),
        TensorPattern("layers.{i}.k_norm", "model.layers.{i}.self_attn.k_norm.weight", ("head_dim",)),
        TensorPattern(
            "layers.{i}.post_norm", "model.layers.{i}.post_attention_layernorm.weight", ("hidden",)
        ),
        TensorPattern("layers.{i}.gate", "model.layers.{i}.mlp.gate_proj.weight", ("ffn", "hidden")),
        TensorPattern("layers.{i}.up", "model.layers.{i}.mlp.up_proj.weight", ("ffn", "hidden")),
        TensorPattern("layers.{i}.down", "model.layers.{i}.mlp.down_proj.weight", ("hidden", "ffn")),
    ),
    attention_biases=(
        TensorPattern("layers.{i}.q_bias", "model.layers.{i}.self_attn.q_proj.bias", ("q",)),
        TensorPattern("layers.{i}.k_bias", "model.layers.{i}.self_attn.k_proj.bias", ("kv",)),
        TensorPattern("layers.{i}.v_bias", "model.layers.{i}.self_attn.v_proj.bias", ("kv",)),
        TensorPattern("layers.{i}.o_bias", "model.layers.{i}.self_attn.o_proj.bias", ("hidden",)),
    ),
    harmless=("*.rotary_emb.inv_freq",),
    mask_token_id=151669,
)

_FAMILIES = {"sdar": _SDAR}
SUPPORTED_MODEL_TYPES = tuple(sorted(_FAMILIES))


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises
    ------
    ConfigError
        If it is not supported.
    """
    if model_type not in _FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    return _FAMILIES[model_type]

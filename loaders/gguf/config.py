"""Metadata of a GGUF file to a ModelConfig, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from losart.config.model import ModelConfig
from losart.config.rope import RopeConfig, inverse_frequencies
from losart.errors import ConfigError
from losart.loaders.conversion import Conversion
from losart.loaders.families import FAMILIES
from losart.loaders.families.family import Family, TensorPattern
from losart.loaders.families.ordinary import ORDINARY
from losart.loaders.families.rope import DEFAULT_THETA
from losart.loaders.gguf.reader import Metadata
from losart.loaders.json_files import errors_naming
from losart.loaders.safetensors_files import MappedTensor

FAMILY, BLOCK_LENGTH = "losart.family", "losart.block_length"
MASK_TOKEN, SHIFTED = "tokenizer.ggml.mask_token_id", "diffusion.shift_logits"  # llama.cpp's
EMBED, HEAD = "token_embd.weight", "output.weight"
FREQUENCIES = "rope_freqs.weight"  # read with the configuration
LLAMA3_POSITIONS = 8192  # that all of its models were trained on first
_NAMES = {
    "embed": EMBED,
    "final_norm": "output_norm.weight",
    "head": HEAD,
    "input_norm": "attn_norm.weight",
    "post_norm": "ffn_norm.weight",
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_NAMES |= {name: f"attn_{name}.weight" for name in "qkv"} | {
    f"{name}_bias": f"attn_{name}.bias" for name in "qkv"
}
_NAMES |= {f"{name}_norm": f"attn_{name}_norm.weight" for name in "qk"}


def _renamed(pattern: TensorPattern) -> TensorPattern:
    return TensorPattern(pattern.name, _NAMES[pattern.name], pattern.shape, pattern.part)


def gguf_family(architecture: str) -> Family:
    """What `general.architecture` calls its tensors in GGUF files."""
    family = ORDINARY[architecture]
    return Family(
        config_values=family.config_values,
        model=tuple(map(_renamed, family.model)),
        head=_renamed(family.head),
        layer_prefix="blk.{i}.",
        layer=tuple(map(_renamed, family.layer)),
    )


def read_conversion(metadata: Metadata) -> Conversion | None:
    """Which block-diffusion family the metadata name; None where they name none.

    Raises
    ------
    ConfigError
        There is no such family, or a key is missing or contradicts it.
    """
    family = metadata.optional_text(FAMILY)
    if family is None:
        return None
    mask = metadata.optional_integer(MASK_TOKEN)
    if mask is None:
        raise metadata.missing(MASK_TOKEN)
    length = metadata.integer(BLOCK_LENGTH)
    conversion = Conversion.of(metadata.file, family, length, mask, FAMILY)
    shifted = metadata.optional_boolean(SHIFTED)
    if shifted is not None and shifted != FAMILIES[family].decoding.shifted:
        raise metadata.error(SHIFTED, f"{str(not shifted).lower()}, as of {FAMILY} {family!r}")
    return conversion


def read_config(
    metadata: Metadata, tensors: Mapping[str, MappedTensor], conversion: Conversion | None
) -> tuple[ModelConfig, str]:
    """The configuration of a file, and its `general.architecture`.

    Parameters
    ----------
    metadata : Metadata
    tensors : mapping of str to MappedTensor
        By name: they tell the size of the vocabulary, and which parts there are.
    conversion : Conversion or None
        An adapter's.

    Raises
    ------
    ConfigError
        A key is missing, impossible, or asks for something that is not supported, or nothing says that the
        model fills in blocks.
    """
    file, architecture = metadata.file, metadata.text("general.architecture")
    if architecture not in ORDINARY:
        supported = ", ".join(ORDINARY)
        raise ConfigError(
            f"{file}: general.architecture {architecture!r} is not supported; supported: {supported}"
        )
    own = read_conversion(metadata)
    if own is not None and conversion is not None and own.family != conversion.family:
        raise ConfigError(
            f"{conversion.file}: family is {conversion.family!r}, and {FAMILY} of {file} is {own.family!r}"
        )
    conversion = conversion or own
    if conversion is None:
        raise ConfigError(
            f"{file}: general.architecture {architecture!r} predicts the next token, and does not fill in "
            f"blocks, unless {FAMILY} or an adapter's losart.json says that it was trained to"
        )

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    for name in ("expert_count", "attention.sliding_window"):
        if metadata.optional_integer(key(name)):
            raise ConfigError(f"{file}: {key(name)} is not supported")
    if EMBED not in tensors:
        raise ConfigError(f"{file}: missing tensor {EMBED!r}")
    hidden, heads = metadata.integer(key("embedding_length")), metadata.integer(key("attention.head_count"))
    head_dim = metadata.optional_integer(key("attention.key_length"), 1) or hidden // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.optional_integer(key(name)) not in (None, head_dim):
            raise metadata.error(key(name), f"the width of a head, {head_dim}")
    eps = metadata.optional_number(key("attention.layer_norm_rms_epsilon"))
    if eps is None:
        raise metadata.missing(key("attention.layer_norm_rms_epsilon"))
    vocab_size, positions = tensors[EMBED].shape[0], metadata.integer(key("context_length"))
    with errors_naming(file):
        config = ModelConfig(
            model_type=conversion.family,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=metadata.integer(key("feed_forward_length")),
            num_layers=metadata.integer(key("block_count")),
            num_heads=heads,
            num_kv_heads=metadata.optional_integer(key("attention.head_count_kv"), 1) or heads,
            head_dim=head_dim,
            max_positions=positions,
            rms_norm_eps=eps,
            rope=_rope(metadata, architecture, positions, head_dim, tensors),
            head_norms=architecture == "qwen3",
            qkv_bias="blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            tie_embeddings=HEAD not in tensors,
            end_token_ids=_end_tokens(metadata, vocab_size),
            dtype=_dtype(tensors),
        )
    return conversion.applied(config), architecture


def _rope(
    metadata: Metadata,
    architecture: str,
    positions: int,
    head_dim: int,
    tensors: Mapping[str, MappedTensor],
) -> RopeConfig:
    prefix = f"{architecture}.rope."
    for name in ("attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"):
        if metadata.optional_number(f"{prefix}scaling.{name}") is not None:
            raise ConfigError(f"{metadata.file}: {prefix}scaling.{name} is not supported")
    kind = metadata.optional_text(f"{prefix}scaling.type") or "none"
    if kind not in ("none", "linear", "yarn"):
        raise metadata.error(f"{prefix}scaling.type", "'none', 'linear' or 'yarn'")
    theta = metadata.optional_number(f"{prefix}freq_base")
    theta = DEFAULT_THETA if theta is None else theta
    if theta <= 1:
        raise metadata.error(f"{prefix}freq_base", "larger than 1")
    if FREQUENCIES in tensors:
        return _llama3(tensors[FREQUENCIES], theta, head_dim)
    if kind == "none":
        return RopeConfig(theta=theta)
    factor = metadata.optional_number(f"{prefix}scaling.factor")
    if factor is None:
        raise metadata.missing(f"{prefix}scaling.factor")
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    original = metadata.optional_integer(f"{prefix}scaling.original_context_length", 1) or positions
    return RopeConfig(theta=theta, kind="yarn", factor=factor, original_max_positions=original)


def _llama3(tensor: MappedTensor, theta: float, head_dim: int) -> RopeConfig:
    """Llama 3's scaling, of which llama.cpp writes what each frequency is divided by."""
    where = f"{tensor.file}: tensor {tensor.name!r}"
    if tensor.dtype != "float32" or tensor.shape != (head_dim // 2,) or head_dim % 2:
        raise ConfigError(f"{where} must be {head_dim // 2} numbers in float32")
    divisors = tensor.array()
    rope = RopeConfig(theta, "llama3", float(divisors[-1]), original_max_positions=LLAMA3_POSITIONS)
    plain, scaled = (inverse_frequencies(one, head_dim)[0] for one in (RopeConfig(theta), rope))
    if not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ConfigError(f"{where}: is not Llama 3's scaling, and others are not supported")
    return rope


def _end_tokens(metadata: Metadata, vocab_size: int) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    tokens = [metadata.optional_integer(key) for key in keys]
    return tuple(dict.fromkeys(token for token in tokens if token is not None and token < vocab_size))


def _dtype(tensors: Mapping[str, MappedTensor]) -> str:
    """In which numbers are held that do not stay codes: bfloat16 if some are, else as scales are."""
    dtypes = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) == 2}
    if "bfloat16" in dtypes:
        return "bfloat16"
    return "float32" if dtypes <= {"float32"} else "float16"

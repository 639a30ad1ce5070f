"""config.json and generation_config.json to a ModelConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from losart.config.model import ModelConfig
from losart.errors import ConfigError
from losart.loaders.families import family_of
from losart.loaders.json_files import JsonObject, errors_naming, read_json_object, read_optional_json_object
from losart.loaders.rope_config import rope_config
from losart.loaders.tokenizer import Tokenizer


def read_model_config(directory: Path, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The configuration of the checkpoint in `directory`.

    Parameters
    ----------
    directory : Path
        Holds config.json and perhaps generation_config.json.
    tokenizer : Tokenizer or None
        Its mask and end tokens serve where the files name none.

    Raises
    ------
    CheckpointError
        If a file is missing or is not a JSON object.
    ConfigError
        If a key is missing, impossible, or asks for something that is not supported.
    """
    config = read_json_object(directory / "config.json")
    generation = read_optional_json_object(directory / "generation_config.json")
    model_type = config.optional_text("model_type")
    if model_type is None:
        raise ConfigError(f"{config.file}: missing key 'model_type'")
    with errors_naming(config.file):
        family = family_of(model_type)
    _refuse_unsupported(config)

    max_positions = config.integer("max_position_embeddings")
    vocab_size = config.integer("vocab_size")
    rope = rope_config(config, max_positions)
    values: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": config.integer("hidden_size"),
        "intermediate_size": config.integer("intermediate_size"),
        "num_layers": config.integer("num_hidden_layers"),
        "num_heads": config.integer("num_attention_heads"),
        "num_kv_heads": config.optional_integer("num_key_value_heads"),
        "head_dim": config.optional_integer("head_dim"),
        "max_positions": max_positions,
        "rms_norm_eps": config.optional_number("rms_norm_eps"),
        "attention_bias": config.boolean("attention_bias", False),
        "tie_embeddings": config.boolean("tie_word_embeddings", False),
        "block_length": _block_length(config, generation, max_positions),
        "mask_token_id": _mask_token_id(config, generation, tokenizer, vocab_size),
        "end_token_ids": _end_token_ids(config, generation, tokenizer, vocab_size),
        "dtype": _dtype(config),
    }
    defaults = {
        "num_kv_heads": values["num_heads"],
        "head_dim": values["hidden_size"] // values["num_heads"],
        "rms_norm_eps": ModelConfig.rms_norm_eps,
        "mask_token_id": family.mask_token_id if family.mask_token_id < vocab_size else None,
    }
    for name, default in defaults.items():
        if values[name] is None:
            values[name] = default
    with errors_naming(config.file):
        return ModelConfig(rope=rope, **values)


def _refuse_unsupported(config: JsonObject) -> None:
    """Refuse what would otherwise be computed wrongly without a word."""
    if config.optional_text("hidden_act") not in (None, "silu"):
        raise config.error("hidden_act", config.get("hidden_act"), "'silu'")
    if config.boolean("use_sliding_window", False):
        raise ConfigError(f"{config.file}: use_sliding_window is not supported")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise config.error("layer_types", layer_types, "'full_attention' for every layer")
    if config.get("quantization_config") is not None:
        raise ConfigError(
            f"{config.file}: quantization_config is not supported; use the unquantized checkpoint"
        )


def _block_length(config: JsonObject, generation: JsonObject, max_positions: int) -> int | None:
    for place in (config, generation):
        for key in ("block_length", "block_size"):
            value = place.optional_integer(key)
            if value is not None:
                if value > max_positions:
                    raise place.error(key, value, f"at most max_position_embeddings ({max_positions})")
                return value
    return None


def _mask_token_id(
    config: JsonObject, generation: JsonObject, tokenizer: Tokenizer | None, vocab_size: int
) -> int | None:
    for place in (config, generation):
        value = place.get("mask_token_id")
        if value is not None:
            return _token_id(place, "mask_token_id", value, vocab_size)
    return None if tokenizer is None else tokenizer.mask_token_id


def _end_token_ids(
    config: JsonObject, generation: JsonObject, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[int, ...]:
    for place in (generation, config):
        value = place.get("eos_token_id")
        if value is not None:
            tokens = value if isinstance(value, list) else [value]
            checked = [_token_id(place, "eos_token_id", token, vocab_size) for token in tokens]
            return tuple(dict.fromkeys(checked))
    if tokenizer is None or tokenizer.eos_token_id is None:
        return ()
    return (tokenizer.eos_token_id,)


def _token_id(place: JsonObject, key: str, value: object, vocab_size: int) -> int:
    token = place.checked_integer(key, value, minimum=0)
    if token >= vocab_size:
        raise place.error(key, token, f"inside the vocabulary of {vocab_size}")
    return token


def _dtype(config: JsonObject) -> str | None:
    dtype = config.optional_text("dtype") or config.optional_text("torch_dtype")
    return dtype.removeprefix("torch.") if dtype else None

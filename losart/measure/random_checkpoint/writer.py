"""The files of a checkpoint with random weights: configuration, tokenizer, and tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from losart.config.model import ModelConfig
from losart.config.precision import FORMATS
from losart.errors import OptionError
from losart.loaders.families import Family, family_of
from losart.loaders.families.family import ConfigFiles
from losart.loaders.json_files import JsonObject
from losart.measure.random_checkpoint.byte_tokenizer import special_token_ids, write_tokenizer
from losart.measure.random_checkpoint.families import FAMILY_KEYS, FAMILY_SIZES
from losart.measure.random_checkpoint.tensors import RandomTensor, write_tensors
from losart.observe.step import Progress

GIB_PER_SHARD = 4


def write_checkpoint(
    directory: str | os.PathLike[str],
    *,
    family: str = "sdar",
    hidden_size: int = 128,
    intermediate_size: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    vocab_size: int = 320,
    max_positions: int = 4096,
    tied: bool = False,
    bias: bool = False,
    dtype: str = "float32",
    shards: int | None = 1,
    block_length: int | None = 4,
    rope_theta: float = 1e6,
    rope_scaling: dict[str, Any] | None = None,
    tokenizer: bool = True,
    head_gain: float = 2.0,
    seed: int = 0,
    extra_config: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint; the same arguments give the same bytes.

    Parameters
    ----------
    directory : path
        Created if need be; files in it are overwritten.
    family : str
        A model type as losart knows it: a key of `FAMILY_KEYS`.
    tied, bias : bool
        Whether the output projection is the embedding; whether the attention has biases.
    dtype : {"float32", "bfloat16", "float16"}
        Of the saved weights.
    shards : int or None
        Number of safetensors files; with more than one, an index is written too. None: by their size.
    block_length : int or None
        None leaves it out of config.json.
    rope_scaling : dict or None
        As in config.json.
    tokenizer : bool
        Whether to write a tokenizer and a chat template; needs a vocabulary of 264 or more.
    head_gain : float
        Mean gain of the q and k norms; its square is the standard deviation of the attention scores.
    extra_config : dict or None
        Further keys of config.json, which override the others.
    progress : callable, optional
        Called with the MiB written and the MiB in total.

    Returns
    -------
    Path
        `directory`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = special_token_ids(vocab_size)
    config = {
        "attention_bias": bias,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "mask_token_id": ids["<|MASK|>"],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_positions,
        "max_window_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": rope_scaling,
        "rope_theta": rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    if block_length is not None:
        config["block_size"] = block_length
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config_file, generation_file = directory / "config.json", directory / "generation_config.json"
    config |= {"model_type": family} | FAMILY_KEYS[family] | (extra_config or {})
    _write_json(config_file, config)
    _write_json(generation_file, generation)
    if tokenizer:
        write_tokenizer(directory, vocab_size)

    files = ConfigFiles(JsonObject(config_file, config), JsonObject(generation_file, generation))
    of_family = family_of(family)
    model = ModelConfig(model_type=family, **of_family.config_values(files))
    tensors = list(_tensors(of_family, model, head_gain))
    if shards is None:
        total = sum(tensor.size for tensor in tensors) * FORMATS[dtype].itemsize
        shards = 1 + total // (GIB_PER_SHARD << 30)
    write_tensors(directory, tensors, FORMATS[dtype], shards, seed, progress)
    return directory


def write_size(
    directory: str | os.PathLike[str],
    size: str,
    *,
    family: str = "sdar",
    dtype: str | None = None,
    **options: Any,
) -> Path:
    """Write a checkpoint of one of a family's sizes (`FAMILY_SIZES`), with options of `write_checkpoint`.

    `dtype` None means that of released checkpoints, bfloat16, but float32 for "tiny". Blocks are as long as
    the family's are by default.

    Raises
    ------
    OptionError
        There is no such family, or no such size of it.
    """
    if family not in FAMILY_SIZES:
        raise OptionError(f"family must be one of {', '.join(FAMILY_SIZES)}, not {family!r}")
    if size not in FAMILY_SIZES[family]:
        raise OptionError(f"size of {family} must be one of {', '.join(FAMILY_SIZES[family])}, not {size!r}")
    dtype = dtype or ("float32" if size == "tiny" else "bfloat16")
    defaults = {"block_length": 4 if family == "sdar" else None}
    return write_checkpoint(
        directory, family=family, dtype=dtype, shards=None, **defaults | FAMILY_SIZES[family][size] | options
    )


def _tensors(family: Family, model: ModelConfig, head_gain: float) -> Iterator[RandomTensor]:
    """Scaled so that attention is peaked, each layer matters, and logits are neither flat nor certain."""
    # At this scale the largest of `vocab_size` random logits begins to stand out of the softmax.
    logits_std = math.sqrt(2 * math.log(model.vocab_size))
    for tensor in family.expected_tensors(model):
        part = tensor.name.rpartition(".")[2]
        if part == "router_bias":
            yield RandomTensor(tensor.source, tensor.shape, std=0.05)
        elif part.endswith("_norm"):
            mean = head_gain if part in ("q_norm", "k_norm") else 1.0
            yield RandomTensor(tensor.source, tensor.shape, std=0.1, mean=mean)
        elif part.endswith("_bias"):
            yield RandomTensor(tensor.source, tensor.shape, std=0.2)
        else:
            std = logits_std if part in ("embed", "head") else 1.0
            yield RandomTensor(tensor.source, tensor.shape, std=std / math.sqrt(tensor.shape[1]))


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

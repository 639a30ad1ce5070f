"""SDAR's files with random weights: configuration, tokenizer and tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from losart.measure.random_checkpoint.byte_tokenizer import special_token_ids, write_tokenizer
from losart.measure.random_checkpoint.tensors import RandomTensor, write_tensors
from losart.observe.observation import Progress

QWEN3: dict[str, Any] = {"num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_positions": 40960}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "0.6B": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_layers": 28, "num_heads": 16, "tied": True},
    "1.7B": QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_layers": 28, "num_heads": 16, "tied": True},
    "4B": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_layers": 36, "num_heads": 32, "tied": True},
    "8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_layers": 36, "num_heads": 32},
}
SHARDS = {"4B": 3, "8B": 5}


def write_checkpoint(
    directory: str | os.PathLike[str],
    *,
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
    shards: int = 1,
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
        Made if need be; files in it are overwritten.
    tied, bias : bool
        No output projection of its own; biases in the attention.
    dtype : {"float32", "bfloat16", "float16"}
        Of the saved weights.
    shards : int
        Number of safetensors files; more than one come with an index.
    block_length : int or None
        None leaves it out of config.json.
    rope_scaling : dict or None
        As in config.json.
    tokenizer : bool
        Whether to write a tokenizer and a chat template; needs a vocabulary of 264 or more.
    head_gain : float
        Mean of the norms' gains of q and k; its square is the standard deviation of attention's scores.
    extra_config : dict or None
        Further keys of config.json, which win over the others.
    progress : callable, optional
        Called while the weights are written with the MiB done and in all.

    Returns
    -------
    Path
        `directory`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = special_token_ids(vocab_size)
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
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
    _write_json(directory / "config.json", config | (extra_config or {}))
    _write_json(directory / "generation_config.json", generation)
    if tokenizer:
        write_tokenizer(directory, vocab_size)

    write_tensors(directory, list(_tensors(config, head_gain)), dtype, shards, seed, progress)
    return directory


def write_size(
    directory: str | os.PathLike[str], size: str, *, dtype: str | None = None, **options: Any
) -> Path:
    """Write a checkpoint of one of `SIZES`; the other options are `write_checkpoint`'s.

    `dtype` None is that of released checkpoints, bfloat16, and float32 for "tiny".
    """
    dtype = dtype or ("float32" if size == "tiny" else "bfloat16")
    return write_checkpoint(directory, **SIZES[size], dtype=dtype, shards=SHARDS.get(size, 1), **options)


def _tensors(config: dict[str, Any], head_gain: float) -> Iterator[RandomTensor]:
    """Scaled so that attention has favourites, each layer matters, and logits are neither flat nor sure."""

    hidden, ffn, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim, bias = config["head_dim"], config["attention_bias"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    # Here the best of `vocab` random logits begins to stand out of the softmax.
    logits_std = math.sqrt(2 * math.log(vocab))

    def norm(name: str, size: int, mean: float = 1.0) -> RandomTensor:
        return RandomTensor(f"{name}.weight", (size,), std=0.1, mean=mean)

    def linear(name: str, rows: int, columns: int, std: float = 1.0) -> RandomTensor:
        return RandomTensor(f"{name}.weight", (rows, columns), std=std / math.sqrt(columns))

    yield linear("model.embed_tokens", vocab, hidden, std=logits_std)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield norm(f"{layer}.input_layernorm", hidden)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield linear(f"{layer}.self_attn.{name}_proj", rows, columns)
            if bias:
                yield RandomTensor(f"{layer}.self_attn.{name}_proj.bias", (rows,), std=0.2)
        yield norm(f"{layer}.self_attn.q_norm", head_dim, mean=head_gain)
        yield norm(f"{layer}.self_attn.k_norm", head_dim, mean=head_gain)
        yield norm(f"{layer}.post_attention_layernorm", hidden)
        yield linear(f"{layer}.mlp.gate_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.up_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.down_proj", hidden, ffn)
    yield norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        yield linear("lm_head", vocab, hidden, std=logits_std)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

"""Checkpoints in SDAR's format with random weights, of any size, written in flat memory.

    python benchmarks/random_checkpoint.py DIRECTORY --size 1.7B --dtype bfloat16 --seed 0

Needs NumPy, and tokenizers for the byte-level tokenizer; no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from byte_tokenizer import special_token_ids, write_tokenizer

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

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_CHUNK = 1 << 22  # values that one thread holds at a time


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be drawn from a normal distribution."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


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
    seed: int = 0,
    extra_config: dict[str, Any] | None = None,
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
    extra_config : dict or None
        Further keys of config.json, which win over the others.

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

    _write_tensors(directory, list(_tensors(config)), dtype, shards, seed)
    return directory


def _tensors(config: dict[str, Any]) -> Iterator[_Tensor]:
    """Scaled so that attention has favourites, each layer matters, and logits are neither flat nor sure."""

    hidden, ffn, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim, bias = config["head_dim"], config["attention_bias"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    # Here the best of `vocab` random logits begins to stand out of the softmax.
    logits_std = math.sqrt(2 * math.log(vocab))

    def norm(name: str, size: int, mean: float = 1.0) -> _Tensor:
        return _Tensor(f"{name}.weight", (size,), std=0.1, mean=mean)

    def linear(name: str, rows: int, columns: int, std: float = 1.0) -> _Tensor:
        return _Tensor(f"{name}.weight", (rows, columns), std=std / math.sqrt(columns))

    yield linear("model.embed_tokens", vocab, hidden, std=logits_std)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield norm(f"{layer}.input_layernorm", hidden)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield linear(f"{layer}.self_attn.{name}_proj", rows, columns)
            if bias:
                yield _Tensor(f"{layer}.self_attn.{name}_proj.bias", (rows,), std=0.2)
        yield norm(f"{layer}.self_attn.q_norm", head_dim, mean=2.0)
        yield norm(f"{layer}.self_attn.k_norm", head_dim, mean=2.0)
        yield norm(f"{layer}.post_attention_layernorm", hidden)
        yield linear(f"{layer}.mlp.gate_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.up_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.down_proj", hidden, ffn)
    yield norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        yield linear("lm_head", vocab, hidden, std=logits_std)


def _write_tensors(directory: Path, tensors: list[_Tensor], dtype: str, shards: int, seed: int) -> None:
    for stale in directory.glob("model*.safetensors*"):
        stale.unlink()
    if shards == 1:
        _write_file(directory / "model.safetensors", tensors, dtype, seed)
        return
    total = sum(tensor.size for tensor in tensors)
    parts: list[list[_Tensor]] = [[] for _ in range(shards)]
    written = 0
    for tensor in tensors:
        parts[min(shards - 1, written * shards // total)].append(tensor)
        written += tensor.size
    weight_map = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        _write_file(directory / name, part, dtype, seed)
        weight_map |= {tensor.name: name for tensor in part}
    metadata = {"total_size": total * _ITEM_SIZE[dtype]}
    _write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def _write_file(file: Path, tensors: list[_Tensor], dtype: str, seed: int) -> None:
    """The safetensors format: length of the header, header in JSON, data."""
    item_size = _ITEM_SIZE[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size * item_size
        entry = {"dtype": _DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)

    with file.open("wb") as stream, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(data_start + end)
        stream.flush()
        jobs = []
        for tensor in tensors:
            offset = data_start + header[tensor.name]["data_offsets"][0]
            for first in range(0, tensor.size, _CHUNK):
                where = offset + first * item_size
                jobs.append(pool.submit(_write_chunk, stream, where, tensor, first, dtype, seed))
        for job in jobs:
            job.result()


def _write_chunk(stream: BinaryIO, offset: int, tensor: _Tensor, first: int, dtype: str, seed: int) -> None:
    # Seeded by name and place, so that neither the threads nor the shards change a value.
    generator = np.random.default_rng([seed, first, *tensor.name.encode()])
    values = generator.standard_normal(min(_CHUNK, tensor.size - first), dtype=np.float32)
    values *= np.float32(tensor.std)
    values += np.float32(tensor.mean)
    data = memoryview(_as_dtype(values, dtype)).cast("B")
    while data:  # one call writes 2 GiB at most
        count = os.pwrite(stream.fileno(), data, offset)
        data, offset = data[count:], offset + count


def _as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        # To the nearest, ties to even: the upper half after adding just under half of it.
        return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return values.astype(dtype, copy=False)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint in SDAR's format with random weights.")
    parser.add_argument("directory")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=_DTYPE_NAMES, help="default: bfloat16, for tiny float32")
    parser.add_argument("--block-length", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    size = arguments.size
    write_checkpoint(
        arguments.directory,
        **SIZES[size],
        dtype=arguments.dtype or ("float32" if size == "tiny" else "bfloat16"),
        shards=SHARDS.get(size, 1),
        block_length=arguments.block_length,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()

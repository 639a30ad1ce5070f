"""GGUF files, written byte by byte, of checkpoints with random weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
ARCHITECTURES = {"stable_diffcoder": "llama", "Fast_dLLM_Qwen": "qwen2", "sdar": "qwen3"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Tensor = tuple[int, tuple[int, ...], bytes]  # type, shape [out, in], data


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value_of(value: Any) -> bytes:
    """The type of a value, and the value."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, np.ndarray):
        return (
            struct.pack("<IIQ", 9, {"int32": 5, "float32": 6}[value.dtype.name], len(value)) + value.tobytes()
        )
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))


def write_gguf(
    file: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    alignment: int = 32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    offsets: Mapping[str, int] | None = None,
) -> Path:
    """`counts` and `offsets`: what the header says instead of what is there."""
    keys = b"".join(text(key) + value_of(value) for key, value in metadata.items())
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        offset = (offsets or {}).get(name, len(data))
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        infos += struct.pack("<IQ", kind, offset)
        data += content + bytes(-len(content) % alignment)
    tensor_count, key_count = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + keys + infos
    file.write_bytes(head + bytes(-len(head) % alignment) + data)
    return file


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp has them: channels side by side that are rotated together."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def packed(values: np.ndarray, kind: str) -> bytes:
    """Rounded to a type, simply; of K types other numbers that are about as large."""
    if kind == "F32":
        return values.astype("<f4").tobytes()
    if kind == "F16":
        return values.astype("<f2").tobytes()
    if kind == "BF16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    numbers, nbytes = BLOCKS[kind]
    blocks = values.reshape(-1, numbers).astype(np.float32)
    if kind in ("Q4_K", "Q6_K"):
        rng = np.random.default_rng(len(blocks))
        data = rng.integers(0, 256, (len(blocks), nbytes), dtype=np.uint8)
        at = (0, 2) if kind == "Q4_K" else (208,)
        for place in at:
            scale = rng.uniform(1e-5, 4e-5, len(blocks)) * (10 if kind == "Q4_K" else 1)
            data[:, place : place + 2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
        return data.tobytes()
    low = blocks.min(1) if kind == "Q4_1" else np.zeros(len(blocks), np.float32)
    steps = {"Q8_0": np.abs(blocks).max(1) / 127, "Q4_0": np.abs(blocks).max(1) / 7}
    scale = steps.get(kind, (blocks.max(1) - low) / 15).astype("<f2")
    low = low.astype("<f2")
    codes = np.rint((blocks - low[:, None].astype(np.float32)) / scale[:, None].astype(np.float32))
    head = [scale.view(np.uint8).reshape(-1, 2)]
    if kind == "Q8_0":
        return np.concatenate([*head, codes.astype(np.int8).view(np.uint8)], axis=1).tobytes()
    if kind == "Q4_1":
        head.append(low.view(np.uint8).reshape(-1, 2))
    codes = np.clip(codes + (8 if kind == "Q4_0" else 0), 0, 15).astype(np.uint8)
    return np.concatenate([*head, codes[:, :16] | codes[:, 16:] << 4], axis=1).tobytes()


def parts_of(
    directory: Path, family: str, kind: str = "F32", embed: str | None = None, **more: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a random checkpoint in float32; matrices in `kind`. `...` leaves a key out."""
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES[family]
    vocabulary = json.loads((directory / "tokenizer.json").read_text())
    vocab = vocabulary["model"]["vocab"] | {one["content"]: one["id"] for one in vocabulary["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {one["content"] for one in vocabulary["added_tokens"]}
    metadata = {
        "general.architecture": architecture,
        "general.name": "random",
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.key_length": config["head_dim"],
        f"{architecture}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{architecture}.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if token in special else 1 for token in tokens], np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.eot_token_id": config["bos_token_id"],
        "tokenizer.ggml.mask_token_id": config["mask_token_id"],
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "losart.family": family,
        "losart.block_length": config.get("block_length", 4),
    } | more
    tensors: dict[str, Tensor] = {}
    for name, values in load_file(directory / "model.safetensors").items():
        parts = name.split(".")
        layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        module, end = name.removeprefix(f"model.layers.{parts[2]}." if layer else "").rsplit(".", 1)
        if architecture == "llama" and NAMES[module] in ("attn_q", "attn_k"):
            heads = "num_attention_heads" if NAMES[module] == "attn_q" else "num_key_value_heads"
            values = permuted(values, config[heads])
        of = "F32" if values.ndim == 1 else embed or kind if NAMES[module] == "token_embd" else kind
        tensors[f"{layer}{NAMES[module]}.{end}"] = TYPES[of], values.shape, packed(values, of)
    return {key: value for key, value in metadata.items() if value is not ...}, tensors

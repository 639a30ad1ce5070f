"""A small model that predicts the next token, as transformers writes it, for the tests of its adaptation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapt.base_model import Base, read_base
from adapt.decoder import Weights, read_shape
from adapt.stream import Noise, Sizes
from adapt.texts import Texts, collect
from adapt.trainer import Plan
from safetensors.torch import save_file

from losart.loaders.json_files import JsonObject
from losart.measure.random_checkpoint.byte_tokenizer import special_token_ids, write_tokenizer

VOCAB = 320
MASK_ID, END_ID = (special_token_ids(VOCAB)[name] for name in ("<|MASK|>", "<|im_end|>"))


def small_base(directory: Path, model_type: str = "llama", **keys: Any) -> Base:
    """Write and open one with random weights, under which every token matters."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type] + "ForCausalLM"],
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **({"head_dim": None} if model_type == "qwen2" else {}),
        **({"hidden_size": 64} if model_type == "qwen2" else {}),
        **keys,
    }
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, VOCAB)
    shape = read_shape(JsonObject(directory / "config.json", config))
    generator = torch.Generator().manual_seed(1)

    def random(*sizes: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*sizes, generator=generator)

    width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "q": (width, shape.hidden),
        "k": (kv, shape.hidden),
        "v": (kv, shape.hidden),
        "o": (shape.hidden, width),
        "gate": (shape.ffn, shape.hidden),
        "up": (shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
        "q_bias": (width,),
        "k_bias": (kv,),
        "v_bias": (kv,),
        "input_norm": (shape.hidden,),
        "post_norm": (shape.hidden,),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
    }
    tensors = {
        "model.embed_tokens.weight": random(shape.vocab, shape.hidden, std=0.5),
        "model.norm.weight": random(shape.hidden, std=0.1, mean=1.0),
    }
    if not shape.tied:
        tensors["lm_head.weight"] = random(shape.vocab, shape.hidden, std=0.5)
    for i in range(shape.layers):
        for kind, name in shape.layer_tensors.items():
            norm = kind.endswith("norm")
            std = 0.1 if norm or kind.endswith("bias") else 1.5 * sizes[kind][1] ** -0.5
            tensors[f"model.layers.{i}.{name}"] = random(*sizes[kind], std=std, mean=float(norm))
    rounded = {name: value.bfloat16().float() for name, value in tensors.items()}
    save_file(rounded, str(directory / "model.safetensors"), {"format": "pt"})
    return read_base(directory)


def rounded(weights: Weights) -> Weights:
    """As a file in bfloat16 has them."""
    return {kind: value.detach().bfloat16().float() for kind, value in weights.items()}


def counting_texts(count: int = 200) -> Texts:
    """Questions of one token, and answers that count on from it for some tokens."""
    rng = np.random.default_rng(0)

    def text() -> tuple[list[int], list[bool]]:
        first, long = int(rng.integers(80)), int(rng.integers(6, 30))
        ids = [5, 6, first, *((first + i) % 80 + 10 for i in range(long)), END_ID]
        return ids, [False] * 3 + [True] * (long + 1)

    return collect(text() for _ in range(count))


def small_plan(**changes: Any) -> Plan:
    """Of a few steps."""
    shifted = changes.pop("shifted", True)
    values = {
        "seconds": 1e9,
        "rate": 2e-2,
        "sizes": Sizes(384, 256, 160),
        "noise": Noise(MASK_ID, END_ID, shifted),
        "steps": 40,
    }
    return Plan(**values | changes)

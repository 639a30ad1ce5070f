"""Passes of dense models of several families, with noise for weights, by what they must read and multiply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cuda.batches import matmul_rate
from benchmarks.cuda.experts import BATCHES, kv_of, milliseconds
from benchmarks.cuda.model import NoiseModel
from benchmarks.cuda.noise import BLOCK, model_config, weight_bytes
from benchmarks.support.attempts import attempt, free_memory, ratio
from losart.config.model import ModelConfig
from losart.measure.random_checkpoint import FAMILY_SIZES

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # SDAR first
    "SDAR-8B": ("sdar", "8B", {}),
    "Nemotron-8B": ("nemotron_labs_diffusion", "8B", {"head_norms": False}),
    "Fast-dLLM-v2-7B": ("Fast_dLLM_Qwen", "7B", {"head_norms": False, "qkv_bias": True}),
    "Stable-DiffCoder-8B": ("stable_diffcoder", "8B", {"head_norms": False}),
}
SIZE_FIELDS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")


def config_of(name: str) -> ModelConfig:
    """A model's sizes and parts."""
    family, size, parts = MODELS[name]
    sizes = {field: FAMILY_SIZES[family][size][field] for field in SIZE_FIELDS}
    return model_config("8B", mask_token_id=sizes["vocab_size"] - 1, **sizes, **parts)


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per model, sequences and prefix."""
    rate = attempt(matmul_rate)
    of_sdar: dict[tuple[int, int], Any] = {}
    for name in MODELS:
        model = attempt(NoiseModel, config_of(name))
        for sequences, prefix in BATCHES[:1] if quick else BATCHES:
            row = {"model": name, "sequences": sequences, "prefix": prefix}
            if isinstance(model, str) or isinstance(rate, str):
                yield row | {"losart": model if isinstance(model, str) else rate}
                continue
            weights, kv = weight_bytes(model.config), sequences * kv_of(model.config, prefix)
            floor = 1e3 * ((weights + kv) / bandwidth + sequences * BLOCK * weights / rate)
            time = attempt(milliseconds, model, sequences, prefix, BLOCK)
            over = ratio(time, floor)
            of_sdar.setdefault((sequences, prefix), over)
            yield row | {
                "floor": floor,
                "losart": time,
                "losart/floor": over,
                "by SDAR's": ratio(over, of_sdar[sequences, prefix]),
            }
            free_memory()
        del model
        free_memory()

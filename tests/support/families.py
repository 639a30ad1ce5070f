"""Small checkpoints of every family, and options with which their decoding shows what is theirs."""

from __future__ import annotations

from typing import Any

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "head_dim": 32, "tokenizer": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdar_moe": ("sdar_moe", {"block_length": 4, "confidence_threshold": 0.4}),
    "fast_dllm": ("Fast_dLLM_Qwen", {"block_size": 8, "small_block_size": 4, "threshold": 0.3}),
    "stable_diffcoder": ("stable_diffcoder", {"block_length": 8, "denoising_steps": 3}),
    "llada2.0": ("llada2_moe", {"block_length": 8, "denoising_steps": 4, "threshold": 0.4}),
    "llada2.1": ("llada2_moe", {"block_length": 8, "threshold": 0.4, "editing_threshold": 0.25}),
    "nemotron": ("nemotron_labs_diffusion", {"block_length": 8, "threshold": 0.3}),
}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "losa": {"attention": "losa", "budget": 32},
    # Not a count between: masked tokens at different positions change by the same, but for rounding.
    "losa none": {"attention": "losa", "budget": 16, "active": 0},
    "losa all": {"attention": "losa", "budget": 16, "active": 1.0},
    "losa anchor": {"attention": "losa", "budget": 16, "selector": "anchor", "commit": "sparse"},
    "quest": {"attention": "quest", "budget": 16, "commit": "sparse"},
    "sparsed": {"attention": "sparsed", "budget": 16},
}

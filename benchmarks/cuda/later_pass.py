"""A whole later pass, dense and LoSA, host and graph launch included, against the memory's floor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cuda.noise import BLOCK, kv_bytes, weight_bytes
from benchmarks.cuda.planted import PlantedPrefix, planted_rows
from benchmarks.support.attempts import attempt, free_memory, ratio
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig

METHODS = {
    "dense": AttentionConfig(),
    "losa": AttentionConfig("losa", budget=512, active=5),
    "losa anchor": AttentionConfig("losa", budget=512, active=5, selector="anchor"),
}


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per size, prefix and method, in milliseconds."""
    for size in ("1.7B",) if quick else ("1.7B", "8B"):
        prefixes = (65536,) if quick else (65536, 131072)
        yield from planted_rows(size, prefixes, lambda planted: rows_of(planted, bandwidth))
        free_memory()


def rows_of(planted: PlantedPrefix, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The rows of one size and prefix."""
    dense = None
    for name, attention in METHODS.items():
        ours, density = measured(planted, attention)
        if name == "dense":
            dense = ours
        config, prefix = planted.model.config, planted.cache.length
        floor = density and pass_bytes(config, prefix, attention, density) / bandwidth * 1e3
        yield {
            "method": name,
            "density": density,
            "floor": floor,
            "losart": ours,
            "losart/floor": ratio(ours, floor),
            "dense/method": ratio(dense, ours),
        }


def measured(planted: PlantedPrefix, attention: AttentionConfig) -> tuple[float | str, float | None]:
    """Milliseconds of a later pass, or why it failed, and the share of the prefix that it reads."""
    passes = attempt(planted.passes, attention)
    if isinstance(passes, str):
        return passes, None
    time = attempt(passes.milliseconds)
    return time, None if isinstance(time, str) else passes.density


def pass_bytes(config: ModelConfig, prefix: int, attention: AttentionConfig, density: float) -> float:
    """What a pass must read: weights, keys and values of what it selects, and what it selects by."""
    read = density * kv_bytes(config, prefix)
    if attention.method == "losa" and attention.selector == "quest":
        # Per channel of 16 pages two codes of 4 bits each, a base and a step; a position has two numbers.
        read += kv_bytes(config, -(-prefix // attention.page_size)) * (16 + 4) / 64
    if attention.method == "losa" and attention.selector == "anchor":
        # The pages of highest mass of each query, int32.
        queries = attention.active_count(BLOCK) * config.num_heads
        read += 4 * queries * attention.pages_per_query
    return weight_bytes(config) + config.num_layers * read

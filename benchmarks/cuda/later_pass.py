"""A whole later pass, dense and LoSA, host and graph launch included, against the memory's floor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cuda.model import NoiseModel
from benchmarks.cuda.noise import BLOCK, kv_bytes
from benchmarks.cuda.planted import PlantedPrefix, planted_rows
from benchmarks.support.attempts import attempt, free_memory, ratio
from losart.config.options import AttentionConfig

METHODS = {
    "dense": AttentionConfig(),
    "losa": AttentionConfig("losa", budget=512, active=5),
    "losa auto": AttentionConfig("losa", budget=512),
    "losa anchor": AttentionConfig("losa", budget=512, active=5, selector="anchor"),
}
MODELS = ("1.7B", "bfloat16"), ("8B", "bfloat16"), ("8B", "int4")


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per size, prefix and method, in milliseconds."""
    for size, weights in MODELS[:1] if quick else MODELS:
        prefixes = (65536,) if quick else (65536, 131072)
        yield from planted_rows(size, prefixes, lambda planted: rows_of(planted, bandwidth), weights)
        free_memory()


def rows_of(planted: PlantedPrefix, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The rows of one size and prefix."""
    dense = None
    for name, attention in METHODS.items():
        ours, density = measured(planted, attention)
        if name == "dense":
            dense = ours
        read = density and pass_bytes(planted.model, planted.cache.length, attention, density)
        floor = read and read / bandwidth * 1e3
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


def pass_bytes(model: NoiseModel, prefix: int, attention: AttentionConfig, density: float) -> float:
    """What a pass must read: weights, keys and values of what it selects, and what it selects by."""
    config = model.config
    read = density * kv_bytes(config, prefix)
    by_mass = attention.pages_by_mass
    if attention.method == "losa" and by_mass < attention.pages_per_query:
        # Per channel of 16 pages two codes of 4 bits each, a base and a step; a position has two numbers.
        read += kv_bytes(config, -(-prefix // attention.page_size)) * (16 + 4) / 64
    if attention.method == "losa":
        # The pages of highest mass of each query, int32.
        read += 4 * attention.active_count(BLOCK) * config.num_heads * by_mass
    return model.read_bytes + config.num_layers * read

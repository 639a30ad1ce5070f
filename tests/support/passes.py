"""Passes made by hand, for tests of backends and policies."""

from __future__ import annotations

from typing import Any

import numpy as np

from losart.config.options import AttentionConfig, GenerationConfig
from losart.engine.batch import PassBatch, PassKind, SequencePass


def options_of(
    block_length: int, attention: AttentionConfig | None = None, **others: Any
) -> GenerationConfig:
    """Options of a generation of which only these matter."""
    attention = AttentionConfig() if attention is None else attention
    values = {"mask_token_id": 0, "denoising_steps": block_length} | others
    return GenerationConfig(block_length=block_length, attention=attention, **values)


def block_batch(
    cache: Any,
    tokens: int,
    kind: PassKind = PassKind.FIRST,
    *,
    slot: Any = None,
    masked: Any = (),
    options: GenerationConfig | None = None,
    ids: Any = None,
    uniforms: Any = (),
) -> PassBatch:
    """A pass over so many rows after a cache's prefix."""
    ids = np.zeros(tokens, np.int64) if ids is None else np.asarray(ids, np.int64)
    sequence = SequencePass(
        *(kind, ids, cache.length, options or options_of(max(tokens, 1)), cache, slot),
        masked=np.asarray(masked, np.int32),
        uniforms=np.asarray(uniforms, np.float64) if len(uniforms) else None,
    )
    return PassBatch((sequence,))


def write(cache: Any, layer: int, k: np.ndarray, v: np.ndarray) -> None:
    """Keys and values of one layer after a prefix on the CPU, which `advance` takes in."""
    cache.reserve(cache.length + len(k))
    cache.table.write(layer, cache.length, k, v)

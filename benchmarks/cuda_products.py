"""The matrix products of a pass against the memory's floor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
from attempts import attempt, ratio
from cuda_noise import NoiseBackend, model_config, noise
from cuda_timing import graph_microseconds

CACHED_BYTES = 400_000_000  # well past what the device's cache holds


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row a product; the weights are read from memory each time."""
    for size in ("8B",) if quick else ("1.7B", "8B"):
        for name, shape in product_shapes(size).items():
            floor = 2 * shape[0] * shape[1] / bandwidth * 1e6
            ours = attempt(microseconds, size, shape)
            yield {
                "size": size,
                "product": name,
                "floor": floor,
                "losart": ours,
                "losart/floor": ratio(ours, floor),
            }


def product_shapes(size: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of each matrix of a pass."""
    c = model_config(size)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "qkv": (q + 2 * kv, c.hidden_size),
        "o": (c.hidden_size, q),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
        "head": (c.vocab_size, c.hidden_size),
    }


def microseconds(size: str, shape: tuple[int, int], block: int = 16) -> float:
    """Of one product with a block's tokens."""
    backend = NoiseBackend(model_config(size), "bfloat16")
    copies = max(2, -(-CACHED_BYTES // (2 * shape[0] * shape[1])))
    matrices = [backend.upload(shape) for _ in range(copies)]
    with backend.stream:
        x = cupy.empty((block, shape[1]), np.uint16)
        noise(np.float32(1.0), x)
    turn = itertools.cycle(matrices)
    return graph_microseconds(backend.stream, lambda: backend.linear(x, next(turn)), 3 * copies)

"""A whole denoising pass, host and graph launch included, against the memory's floor and transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from attempts import attempt, free_memory, ratio
from cuda_noise import NoiseBackend, Shapes, filled_cache, kv_bytes, model_config
from cuda_timing import run_microseconds
from cuda_transformers import TransformersPass

from losart.attention import make_policy
from losart.attention.base import PassKind
from losart.backends.base import PassInputs
from losart.options import AttentionConfig, generation_config
from losart.transformer import Transformer

BLOCK = 16


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row a size and prefix, in milliseconds."""
    prefixes = (8192, 65536) if quick else (8192, 65536, 131072)
    for size in ("8B",) if quick else ("1.7B", "8B"):
        ours = milliseconds(LosartPass, size, prefixes)
        theirs = milliseconds(TransformersPass, size, prefixes)
        for prefix in prefixes:
            floor = pass_bytes(size, prefix) / bandwidth * 1e3
            yield {
                "size": size,
                "prefix": prefix,
                "floor": floor,
                "losart": ours[prefix],
                "losart/floor": ratio(ours[prefix], floor),
                "transformers": theirs[prefix],
                "transformers/losart": ratio(theirs[prefix], ours[prefix]),
            }


def milliseconds(kind: Callable[[str], Any], size: str, prefixes: tuple[int, ...]) -> dict[int, Any]:
    """Of each prefix, from a model made once; its memory is free afterwards."""
    model = attempt(kind, size)
    if isinstance(model, str):
        return dict.fromkeys(prefixes, model)
    times = {prefix: attempt(model.milliseconds, prefix) for prefix in prefixes}
    del model
    free_memory()
    return times


def pass_bytes(size: str, prefix: int) -> int:
    """What a pass must read: all weights, but of the embedding only a few rows; keys and values."""
    config = model_config(size)
    weights = sum(2 * math.prod(shape) for name, shape in Shapes(config).items() if name != "embed")
    return weights + config.num_layers * kv_bytes(config, prefix)


class LosartPass:
    """Our model of a size, with noise for weights."""

    def __init__(self, size: str) -> None:
        self.config = model_config(size)
        self.backend = NoiseBackend(self.config, "bfloat16")
        self.transformer = Transformer(self.config, Shapes(self.config), self.backend)

    def milliseconds(self, prefix: int) -> float:
        """Median milliseconds of a pass over a block, after the passes that compile and capture it."""
        generation = generation_config(self.config, {"block_length": BLOCK})
        cache = filled_cache(self.backend, prefix, BLOCK)
        policy = make_policy(AttentionConfig(), self.config, BLOCK)
        policy.begin_block()
        policy.begin_pass(PassKind.LATER, prefix)
        inputs = PassInputs(np.arange(BLOCK), np.arange(BLOCK), np.zeros(BLOCK))

        def run() -> None:
            self.transformer.denoise(inputs, cache, policy, generation)

        return run_microseconds(self.backend.stream, run) / 1e3

"""A whole denoising pass, host and graph launch included, against the memory's floor and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.cuda.model import LaterPasses, NoiseModel
from benchmarks.cuda.noise import BLOCK, filled_cache, kv_bytes, model_config, weight_bytes
from benchmarks.cuda.torch_attention import run_microseconds
from benchmarks.support.attempts import attempt, free_memory, ratio
from benchmarks.support.transformers_pass import TransformersPass
from losart.config.options import AttentionConfig


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per size and prefix, in milliseconds."""
    prefixes = (8192, 65536) if quick else (8192, 65536, 131072)
    for size in ("8B",) if quick else ("1.7B", "8B"):
        config = model_config(size)
        ours = milliseconds(OurPass, size, prefixes)
        theirs = milliseconds(TheirPass, size, prefixes)
        for prefix in prefixes:
            read = weight_bytes(config) + config.num_layers * kv_bytes(config, prefix)
            floor = read / bandwidth * 1e3
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


class OurPass(NoiseModel):
    """losart's side."""

    def milliseconds(self, prefix: int) -> float:
        """Median milliseconds of a later pass over a block after a cache of noise."""
        cache = filled_cache(self.backend, prefix, BLOCK)
        return LaterPasses(self, cache, [np.arange(BLOCK)], AttentionConfig()).milliseconds()


class TheirPass(TransformersPass):
    """transformers' side."""

    def milliseconds(self, prefix: int) -> float:
        """Median milliseconds of a forward over a block after a cache of noise."""
        return run_microseconds(self.after(prefix, BLOCK)) / 1e3

"""Dense attention of a block over the prefix, against the memory's floor and torch's flash attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.cuda.noise import filled_cache, kv_bytes, model_config, placed_queries, uncached
from benchmarks.cuda.timing import graph_microseconds
from benchmarks.cuda.torch_attention import flash_over_prefix
from benchmarks.support.attempts import attempt, ratio
from losart.backends.cuda.backend import CudaBackend
from losart.config.model import ModelConfig
from losart.config.precision import Precision


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per block length and prefix, of SDAR-8B's heads."""
    blocks = (16,) if quick else (4, 16, 32)
    prefixes = (16384, 65536) if quick else (4096, 8192, 16384, 32768, 65536, 131072)
    for block, prefix, kv in itertools.product(blocks, prefixes, ("auto", "int8")):
        one_layer = kv_bytes(model_config("8B"), prefix, kv)
        config = model_config("8B", num_layers=uncached(one_layer))
        floor = one_layer / bandwidth * 1e6
        ours = attempt(microseconds, config, block, prefix, kv)
        theirs = attempt(flash_over_prefix, config, block, prefix)
        yield {
            "block": block,
            "prefix": prefix,
            "kv": kv,
            "floor": floor,
            "losart": ours,
            "losart/floor": ratio(ours, floor),
            "torch flash": theirs,
            "torch/losart": ratio(theirs, ours),
        }


def microseconds(config: ModelConfig, block: int, prefix: int, kv: str) -> float:
    """Of one layer, the merge of its parts included."""
    backend = CudaBackend(config, Precision.of("bfloat16", kv))
    cache = filled_cache(backend, prefix)
    q, batch = placed_queries(backend, cache, block)
    layer = itertools.cycle(range(config.num_layers))

    def launch() -> Any:
        return backend.merge(backend.prefix_attention(next(layer), q, batch))

    return graph_microseconds(backend.memory.stream, launch, max(8, config.num_layers))

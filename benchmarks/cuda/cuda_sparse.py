"""Prefix attention of later passes, with all that sparse methods do, against dense."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from attempts import attempt, ratio
from cuda_noise import kv_bytes, model_config
from cuda_timing import graph_microseconds
from cuda_topics import Topics

from losart.attention import make_policy
from losart.attention.policy import AttentionPolicy, PassKind
from losart.backends.base import PassInputs
from losart.backends.cuda.backend import CudaBackend
from losart.config.options import AttentionConfig

BLOCK = 16
CACHED_BYTES = 400_000_000  # well past what the device's cache holds


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row a prefix and budget, of SDAR-8B's heads."""
    prefixes = (65536,) if quick else (32768, 65536, 131072)
    for prefix in prefixes:
        layers = max(2, -(-CACHED_BYTES // kv_bytes(model_config("8B"), prefix)))
        prefix_attention = attempt(PrefixAttention, layers, prefix)
        if isinstance(prefix_attention, str):
            yield {"prefix": prefix, "failed": prefix_attention}
            continue
        dense, _ = prefix_attention.measure("dense")
        for budget in (512,) if quick else (128, 256, 512, 1024):
            row = {"prefix": prefix, "budget": budget, "dense": dense}
            for name, method, options in (
                ("losa 5", "losa", {"active": 5}),
                ("losa 8", "losa", {"active": 8}),
                ("anchor 5", "losa", {"active": 5, "selector": "anchor"}),
                ("quest", "quest", {}),
                ("sparsed", "sparsed", {}),
            ):
                time, density = prefix_attention.measure(method, budget=budget, **options)
                row |= {name: time, f"{name} read": density, f"dense/{name}": ratio(dense, time)}
            row["quest/losa 5"] = ratio(row["quest"], row["losa 5"])
            yield row
        del prefix_attention


class PrefixAttention:
    """Attention over a prefix in some layers."""

    def __init__(self, layers: int, prefix: int) -> None:
        self.config = model_config("8B", num_layers=layers, max_positions=prefix + BLOCK)
        self.backend = CudaBackend(self.config, "bfloat16")
        topics = Topics(self.backend, prefix)
        self.cache = topics.cache(BLOCK)
        self.queries = [topics.queries(layer, BLOCK, 3) for layer in range(layers)]

    def measure(self, method: str, **options: Any) -> tuple[float, float]:
        """Microseconds of one layer of a later pass, and the share of the prefix that it reads."""
        backend, cache, layers = self.backend, self.cache, self.config.num_layers
        policy = make_policy(AttentionConfig(method, **options), self.config, BLOCK)
        policy.use(backend)
        with backend.stream:
            backend._place(_inputs(), cache)
            policy.begin_pass(PassKind.FIRST, cache.length)
            for layer, (first, *_) in enumerate(self.queries):
                policy.prefix(backend, layer, first, cache)
            policy.begin_pass(PassKind.LATER, cache.length)
            backend._place(_inputs(), cache)
            for layer, (_, second, _) in enumerate(self.queries):
                policy.prefix(backend, layer, second, cache)
            positions, _ = backend._given.get()
        read = layers * self.config.num_kv_heads * cache.length
        # A pass over all layers changes the queries that the next one meets.
        turns = itertools.cycle((n, layer) for n in (2, 1) for layer in range(layers))

        def launch() -> Any:
            n, layer = next(turns)
            return self._attend(policy, layer, self.queries[layer][n])

        launch()
        for _ in range(2 * layers - 1):
            next(turns)
        time = graph_microseconds(backend.stream, launch, 2 * layers)
        return time, 1.0 if method == "dense" else positions / read

    def _attend(self, policy: AttentionPolicy, layer: int, q: Any) -> Any:
        backend = self.backend
        prefix = policy.prefix(backend, layer, q, self.cache)
        # LoSA's are merged already, into what it keeps.
        return prefix if isinstance(prefix, tuple) else backend.merge(prefix)


def _inputs() -> PassInputs:
    return PassInputs(np.zeros(BLOCK, np.int64), np.arange(BLOCK))

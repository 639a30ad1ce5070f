"""Prefix attention of later passes, with all that sparse methods do, against dense."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np

from benchmarks.cuda.noise import BFLOAT16, BLOCK, kv_bytes, model_config, pass_after, uncached
from benchmarks.cuda.timing import graph_microseconds
from benchmarks.cuda.topics import Topics
from benchmarks.support.attempts import attempt, ratio
from losart.attention import make_policy
from losart.backends.cuda.backend import CudaBackend
from losart.config.options import AttentionConfig
from losart.engine.batch import PassKind


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per prefix and budget, of SDAR-8B's heads."""
    prefixes = (65536,) if quick else (32768, 65536, 131072)
    for prefix in prefixes:
        layers = uncached(kv_bytes(model_config("8B"), prefix))
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


def active_rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per prefix and number of active tokens."""
    for prefix in (65536,) if quick else (32768, 65536, 131072):
        layers = uncached(kv_bytes(model_config("8B"), prefix))
        dense = None
        for active in (0, 1, 2, 4, 8, 16):
            row = {"prefix": prefix, "active": active}
            prefix_attention = attempt(PrefixAttention, layers, prefix, active)
            if isinstance(prefix_attention, str):
                yield row | {"failed": prefix_attention}
                continue
            if dense is None:
                dense, _ = prefix_attention.measure("dense")
            time, density = prefix_attention.measure("losa", budget=128)
            yield row | {"dense": dense, "losa": time, "losa read": density, "dense/losa": ratio(dense, time)}
            del prefix_attention


class PrefixAttention:
    """Attention over a prefix in some layers, of queries of which some change from pass to pass."""

    def __init__(self, layers: int, prefix: int, changed: int = 3) -> None:
        self.config = model_config("8B", num_layers=layers, max_positions=prefix + BLOCK)
        self.backend = CudaBackend(self.config, BFLOAT16)
        topics = Topics(self.backend, prefix)
        self.cache = topics.cache(BLOCK)
        self.queries = [topics.queries(layer, BLOCK, 3, changed) for layer in range(layers)]

    def measure(self, method: str, **options: Any) -> tuple[float, float]:
        """Microseconds of one layer of a later pass, and the share of the prefix that it reads."""
        backend, cache, layers = self.backend, self.cache, self.config.num_layers
        attention = AttentionConfig(method, **options)
        policy = make_policy(attention, self.config, BLOCK)
        slot = None if policy.stored is None else backend.new_slot(policy.stored)

        def attend(layer: int, n: int) -> Any:
            prefix, _ = policy.prefix(backend, layer, self.queries[layer][n], batch)
            return backend.merge(prefix)

        with backend.memory.stream:
            batch = backend.runner.place(pass_after(cache, BLOCK, PassKind.FIRST, attention, slot))
            k = v = cupy.zeros((BLOCK, self.config.num_kv_heads, self.config.head_dim), np.float32)
            for layer in range(layers):
                q = self.queries[layer][0]
                prefix, _ = policy.prefix(backend, layer, q, batch)
                backend.block_attention(q, k, v, prefix, batch)  # which stores
            batch = backend.runner.place(pass_after(cache, BLOCK, PassKind.LATER, attention, slot))
            for layer in range(layers):
                attend(layer, 1)
            positions = int(batch.buffers.fetch()[0][0, 0])
        # With a count each pass leaves the queries that the next one is compared with. By default
        # block_attention would: here all passes are compared with the first one.
        passes = (1, 1) if attention.active == "auto" else (2, 1)
        turns = itertools.cycle((layer, n) for n in passes for layer in range(layers))

        def launch() -> Any:
            return attend(*next(turns))

        launch()
        for _ in range(2 * layers - 1):
            next(turns)
        time = graph_microseconds(backend.memory.stream, launch, 2 * layers)
        read = layers * self.config.num_kv_heads * cache.length
        return time, 1.0 if method == "dense" else positions / read

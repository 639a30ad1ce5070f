"""A whole generation after a long prompt by each method, and where its time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.cuda.model import NoiseModel
from benchmarks.cuda.noise import BLOCK
from benchmarks.support.attempts import attempt, ratio
from losart.api.session import Session
from losart.engine.batch import PassBatch, PassResult
from losart.engine.engine import Engine
from losart.models.transformer import Transformer
from losart.observe.step import Stats

SIZE = "1.7B"
RIDING = "commit and first"
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "losa": {"attention": "losa", "budget": 512, "active": 5},
    "losa anchor": {"attention": "losa", "budget": 512, "active": 5, "selector": "anchor"},
    "quest": {"attention": "quest", "budget": 512},
}


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per method."""
    prompt, new_tokens = (16384, 64) if quick else (65536, 256)
    model = attempt(NoiseModel, SIZE, TimedTransformer)
    if isinstance(model, str):
        yield {"prompt": prompt, "method": model}
        return
    dense = None
    for name, options in METHODS.items():
        row = {"prompt": prompt, "method": name}
        measured = attempt(generation, model, prompt, new_tokens, options)
        if isinstance(measured, str):
            yield row | {"tokens a second": measured}
            continue
        stats, seconds = measured
        if name == "dense":
            dense = stats.tokens_per_second
        row |= {
            "tokens a second": stats.tokens_per_second,
            "method/dense": ratio(stats.tokens_per_second, dense),
            "density": stats.sparse_density,
            "decoding s": stats.decode_seconds,
        }
        for kind in ("first", RIDING, "later", "commit"):
            of_kind = seconds[kind]
            row |= {
                f"{kind} passes": len(of_kind),
                f"{kind} ms": 1e3 * sum(of_kind) / max(1, len(of_kind)),
                f"{kind} s": sum(of_kind),
            }
        yield row | {"outside passes s": stats.decode_seconds - sum(map(sum, seconds.values()))}


def generation(
    model: NoiseModel, prompt: int, new_tokens: int, options: dict[str, Any]
) -> tuple[Stats, dict[str, list[float]]]:
    """Figures of a generation, and the seconds of its passes, after one that prefills, compiles and captures.

    The second one finds the whole prompt in the session's cache.
    """
    fixed = {
        "max_new_tokens": new_tokens,
        "block_length": BLOCK,
        "denoising_steps": BLOCK,
        "remasking": "low_confidence_static",
        "stop_token_ids": [],
    }
    session = Session(Engine(model.transformer), None, None, fixed | options)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=prompt).tolist()
    session.generate(ids)
    model.transformer.seconds.clear()
    stats = session.generate(ids).stats
    return stats, model.transformer.seconds.copy()


class TimedTransformer(Transformer):
    """Notes the seconds of each pass, by its kind. Each is waited for, so that none is counted to the next.

    A first pass with which a commit rides is a kind of its own.

    Denoising passes wait for their proposals anyway; what this adds is a wait after a commit.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        backend: Any = self.backend
        began = time.perf_counter()
        result = super().forward(batch, observe)
        backend.memory.stream.synchronize()
        self.seconds[RIDING if batch.rides else batch.kind.value].append(time.perf_counter() - began)
        return result

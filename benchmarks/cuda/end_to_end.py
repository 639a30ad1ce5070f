"""Whole generations after a long prompt by each method, and where their time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from benchmarks.cuda.model import NoiseModel
from benchmarks.cuda.noise import BLOCK
from benchmarks.support.attempts import attempt, free_memory, ratio
from losart.api.session import Session
from losart.engine.batch import PassBatch, PassResult
from losart.engine.engine import Engine
from losart.models.transformer import Transformer
from losart.observe.step import Stats

RIDING = "commit and first"
BUDGET = 128
MEAN_ACTIVE = 1.1  # tokens per layer of the shipped checkpoint with one token per pass (active.py, 16K)
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "losa 5": {"attention": "losa", "budget": BUDGET, "active": 5},
    "losa": {"attention": "losa", "budget": BUDGET},
    "losa as trained": {"attention": "losa", "budget": BUDGET},
    "losa 5 anchor": {"attention": "losa", "budget": BUDGET, "active": 5, "selector": "anchor"},
    "quest": {"attention": "quest", "budget": BUDGET},
}
RUNS = (("1.7B", 65536), ("8B", 65536), ("8B", 131072))


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per size, prompt and method."""
    new_tokens = 64 if quick else 256
    for size, prompts in groupby((("1.7B", 16384),) if quick else RUNS, itemgetter(0)):
        model = attempt(NoiseModel, size, TimedTransformer)
        for _, prompt in prompts:
            row = {"size": size, "prompt": prompt}
            if isinstance(model, str):
                yield row | {"method": model}
            else:
                for measured in method_rows(model, prompt, new_tokens):
                    yield row | measured
        del model
        free_memory()


def method_rows(model: NoiseModel, prompt: int, new_tokens: int) -> Iterator[dict[str, Any]]:
    """One row per method, all over one prefill."""
    fixed = {
        "block_length": BLOCK,
        "denoising_steps": BLOCK,
        "remasking": "low_confidence_static",
        "stop_token_ids": [],
    }
    session = Session(Engine(model.transformer), None, None, fixed)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=prompt).tolist()
    seconds, dense = model.transformer.seconds, None
    for name, options in METHODS.items():

        def generate(tokens: int, **more: Any) -> Stats:
            seconds.clear()
            return session.generate(ids, max_new_tokens=tokens, **options, **more).stats  # noqa: B023

        more = {}
        if name == "losa as trained":
            threshold = attempt(matching_threshold, generate)
            if isinstance(threshold, str):
                yield {"method": name, "tokens a second": threshold}
                continue
            more["change_threshold"] = threshold
        attempt(partial(generate, **more), 3 * BLOCK)  # compiles and captures
        stats = attempt(partial(generate, **more), new_tokens)
        if isinstance(stats, str):
            yield {"method": name, "tokens a second": stats}
            continue
        dense = stats.tokens_per_second if name == "dense" else dense
        row = {
            "method": name,
            "tokens a second": stats.tokens_per_second,
            "method/dense": ratio(stats.tokens_per_second, dense),
            "active": None if stats.active_fraction is None else BLOCK * stats.active_fraction,
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


def matching_threshold(generate: Callable[..., Stats]) -> float:
    """The threshold above which as many tokens change as with the trained checkpoint, by bisection.

    Queries of random weights change more than trained ones.
    """
    low, high = 0.0, 4.0
    for _ in range(10):
        middle = (low + high) / 2
        fraction = generate(2 * BLOCK, change_threshold=middle).active_fraction
        low, high = (middle, high) if (fraction or 0.0) * BLOCK > MEAN_ACTIVE else (low, middle)
    return high


class TimedTransformer(Transformer):
    """Notes the seconds of each pass, by its kind. Each is waited for, so that none is counted to the next.

    A first pass with which a commit rides is a kind of its own.

    Denoising passes wait for their proposals anyway; what this adds is a wait after a commit.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def begin(self, batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        backend: Any = self.backend
        began = time.perf_counter()
        finish = super().begin(batch, observe)

        def timed() -> PassResult:
            result = finish()
            backend.memory.stream.synchronize()
            self.seconds[RIDING if batch.rides else batch.kind.value].append(time.perf_counter() - began)
            return result

        return timed

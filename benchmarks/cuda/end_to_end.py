"""Whole generations after a long prompt by each method, and where their time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from benchmarks.cuda.model import NoiseModel, TimedTransformer
from benchmarks.cuda.noise import BLOCK
from benchmarks.support.attempts import attempt, free_memory, ratio
from losart.api.session import Session
from losart.observe.step import Stats

RIDING = "commit and first"
BUDGET = 128
MEAN_ACTIVE = 1.1  # tokens per layer of the shipped checkpoint with one token per pass (active.py, 16K)
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "losa 5": {"attention": "losa", "budget": BUDGET, "active": 5},
    "losa": {"attention": "losa", "budget": BUDGET},
    "losa by bound": {"attention": "losa", "budget": BUDGET, "selector": "quest"},
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
    session = Session(model.transformer, None, None, fixed)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=prompt).tolist()
    passes, dense = model.transformer.passes, None
    for name, options in METHODS.items():

        def generate(tokens: int, **more: Any) -> Stats:
            passes.clear()
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
            of_kind = [one.seconds for one in passes if (RIDING if one.rides else one.kind.value) == kind]
            row |= {
                f"{kind} passes": len(of_kind),
                f"{kind} ms": 1e3 * sum(of_kind) / max(1, len(of_kind)),
                f"{kind} s": sum(of_kind),
            }
        yield row | {"outside passes s": stats.decode_seconds - sum(one.seconds for one in passes)}


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

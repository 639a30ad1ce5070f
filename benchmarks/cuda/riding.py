"""Whole generations whose commits ride with the first pass over the next block, beside two passes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.cuda.model import NoiseModel
from benchmarks.cuda.noise import BLOCK
from benchmarks.support.attempts import attempt, free_memory, ratio
from losart.api.session import Session

STEPS, NEW_TOKENS, ROUNDS = 4, 256, 4
METHODS: dict[str, dict[str, Any]] = {"dense": {}, "losa": {"attention": "losa", "budget": 128}}


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per size, prompt and method, in milliseconds per denoising pass, commits included."""
    for size in ("1.7B",) if quick else ("1.7B", "8B"):
        model = attempt(NoiseModel, size)
        for prompt in (8192,) if quick else (8192, 32768):
            for name, options in METHODS.items():
                row = {"size": size, "prompt": prompt, "method": name}
                times = model if isinstance(model, str) else attempt(milliseconds, model, prompt, options)
                if isinstance(times, str):
                    yield row | {"failed": times}
                    continue
                two, riding = (statistics.median(of_kind) for of_kind in times)
                rounds = [b / a for a, b in zip(*times, strict=True)]
                yield row | {
                    "two passes": two,
                    "riding": riding,
                    "riding/two": ratio(riding, two),
                    "least": min(rounds),
                    "most": max(rounds),
                }
        del model
        free_memory()


def milliseconds(model: NoiseModel, prompt: int, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Without and with riding, in turns, after a round that prefills, compiles and captures."""
    fixed = {
        "max_new_tokens": NEW_TOKENS,
        "block_length": BLOCK,
        "denoising_steps": STEPS,
        "remasking": "low_confidence_static",
        "stop_token_ids": [],
    }
    session = Session(model.transformer, None, None, fixed | options)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=prompt).tolist()
    times: tuple[list[float], list[float]] = ([], [])
    riding_blocks = model.backend.riding_blocks
    try:
        for _ in range(1 + ROUNDS):
            for of_kind, blocks in zip(times, ((), riding_blocks), strict=True):
                model.backend.riding_blocks = blocks
                stats = session.generate(ids).stats
                of_kind.append(1e3 * stats.decode_seconds / stats.denoising_passes)
    finally:
        model.backend.riding_blocks = riding_blocks
    return times[0][1:], times[1][1:]

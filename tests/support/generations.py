"""Greedy and sampled generations of every method, option and block length, to compare versions of losart.

`python tests/support/generations.py FILE [DEVICE]` writes them, by the version that is installed.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import losart

DTYPES = ("float32", "bfloat16")
BLOCK_LENGTHS = (1, 4, 16, 33)
PROMPT = np.random.default_rng(7).integers(0, 256, 333).tolist()
SPARSE = {"budget": 48}
METHODS: list[dict[str, Any]] = [
    {},
    {"attention": "losa"},
    {"attention": "losa", "active": 0},
    {"attention": "losa", "active": 0.5, "commit": "sparse"},
    {"attention": "losa", "drift": "refresh", "candidates": "masked"},
    {"attention": "losa", "active": "auto"},
    {"attention": "losa", "selector": "anchor", "dense_layers": 1},
    {
        "attention": "losa",
        "selector": "anchor",
        "drift": "refresh",
        "candidates": "masked",
        "commit": "sparse",
    },
    {"attention": "losa", "first_pass": "sparse", "page_size": 32},
    {"attention": "losa", "planner": "host"},
    {"attention": "quest"},
    {"attention": "quest", "first_pass": "dense", "commit": "sparse", "page_size": 48},
    {"attention": "sparsed"},
    {"attention": "sparsed", "dense_layers": 2, "commit": "sparse"},
]
OTHERS: list[dict[str, Any]] = [
    {"remasking": "sequential"},
    {"remasking": "low_confidence_static", "denoising_steps": 3},
    {"remasking": "entropy_bounded"},
    {"confidence_threshold": 0.1},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.2, "seed": 4, "top_k": 7},
    {"temperature": 1.2, "seed": 4, "top_p": 0.7},
    {"stop_token_ids": [17, 90, 200]},
]


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Options of single generations, by a name that says them."""
    for length, options in itertools.product(BLOCK_LENGTHS, METHODS):
        sparse = SPARSE if options else {}
        yield (
            name_of(options, length),
            {"block_length": length, "remasking": "low_confidence_static", "active": 5} | sparse | options,
        )
    for length, options in itertools.product(BLOCK_LENGTHS, OTHERS):
        yield name_of(options, length), {"block_length": length, **options}


def name_of(options: dict[str, Any], length: int) -> str:
    return " ".join([*(f"{key}={value}" for key, value in options.items()), f"block_length={length}"])


def generations(model: losart.Model) -> dict[str, Any]:
    """What a model gives for each case, and for sessions whose prompts share a prefix."""
    found: dict[str, Any] = {}
    for name, options in cases():
        found[name] = summary(
            model.generate(PROMPT, **{"max_new_tokens": 36, "stop_token_ids": []} | options)
        )
    for length, method in itertools.product(BLOCK_LENGTHS, ({}, METHODS[1] | SPARSE)):
        options = {"max_new_tokens": 20, "stop_token_ids": [], "block_length": length, "active": 5}
        session = model.session(**options, **method)
        turns = [session.generate(PROMPT[:90])]
        turns.append(session.generate([*PROMPT[:90], *turns[0].token_ids, *PROMPT[200:230]]))
        turns.append(session.generate([*PROMPT[:70], *PROMPT[100:140]]))
        found["session " + name_of(method, length)] = [summary(turn) for turn in turns]
    return found


def summary(result: losart.GenerationResult) -> dict[str, Any]:
    stats = result.stats
    reads = (stats.density, stats.sparse_density, stats.active_fraction)
    return {
        "tokens": result.token_ids,
        "passes": [stats.denoising_passes, stats.commit_passes, stats.reused_tokens, stats.prefilled_tokens],
        "reads": [None if read is None else round(read, 9) for read in reads],
    }


def all_generations(device: str) -> dict[str, Any]:
    """Generations in each dtype, of a random checkpoint and of the one that comes with losart."""
    try:
        from losart.measure.random_checkpoint import write_checkpoint
    except ImportError:  # of the version before
        from losart.random_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {"random": write_checkpoint(Path(folder, "random")), "small": None}
        return {
            f"{name} {dtype}": generations(losart.load(path, device, dtype))
            for name, path in checkpoints.items()
            for dtype in DTYPES
        }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(
        json.dumps(all_generations(sys.argv[2] if len(sys.argv) > 2 else "cpu"), separators=(",", ":"))
    )

"""Random requests that share beginnings, are cancelled and run out of memory: each gives what it gives alone.

LOSART_SOAK_REQUESTS asks for more of them than the few hundred by default.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_rows import model_by_rows
from scarce_memory import ScarceMemory

import losart
from losart import OutOfMemoryError
from losart.engine.kv_cache import PagedKVCache
from losart.engine.sequence import Sequence
from losart.engine.stream import Stream
from losart.measure.random_checkpoint import write_checkpoint

REQUESTS = int(os.environ.get("LOSART_SOAK_REQUESTS", 400))
MOST_GROWTH = 8 << 20  # bytes; what is allocated is not the same twice
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 12},
    {"max_new_tokens": 70, "remasking": "sequential"},
    {"max_new_tokens": 30, "attention": "losa", "budget": 32},
    {"max_new_tokens": 20, "attention": "quest", "budget": 32, "temperature": 0.8, "seed": 3},
    {"max_new_tokens": 40, "block_length": 7, "page_size": 32},
    {"max_new_tokens": 40, "attention": "quest", "budget": 32, "commit": "sparse", "first_pass": "sparse"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> losart.Model:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "head_dim": 16}
    path: Path = write_checkpoint(tmp_path_factory.mktemp("soak"), **small)
    return model_by_rows(path)


@pytest.fixture(scope="module")
def alone(model) -> dict[Any, list[int]]:
    return {}


def prompts(rng: np.random.Generator) -> list[list[int]]:
    """Some that begin as others."""
    documents = rng.integers(0, 256, (3, 700))
    found = []
    for _ in range(24):
        document, cut, more = documents[rng.integers(3)], rng.integers(1, 700), rng.integers(1, 60)
        found.append([*document[:cut].tolist(), *rng.integers(0, 256, more).tolist()])
    return found


PROMPTS = prompts(np.random.default_rng(0))


def live() -> int:
    """How many sequences and caches there are."""
    gc.collect()
    return sum(isinstance(one, PagedKVCache | Sequence) for one in gc.get_objects())


def resident() -> int:
    """Bytes of the process that are in memory; 0 where nothing tells."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def request_of(number: int) -> tuple[list[int], dict[str, Any]]:
    prompt, options = divmod(number, len(OPTIONS))
    return PROMPTS[prompt], {"block_length": 4, "stop_token_ids": [], **OPTIONS[options]}


@pytest.mark.parametrize(
    ("sequences", "chunks", "failures"),
    [(16, None, 0.0), (16, None, 0.1), (4, 6, 0.0), (16, 8, 0.05), (1, 4, 0.05)],
)
def test_each_is_what_it_is_alone_and_nothing_is_left(model, alone, monkeypatch, sequences, chunks, failures):
    rng, others = np.random.default_rng(sequences), live()
    memory = ScarceMemory()
    memory.install(model._engine.runner.backend, monkeypatch)
    chunk = model._engine.runner.backend.new_cache(16, 256).chunk_bytes
    limit = None if chunks is None else chunks * chunk
    engine = losart.Engine(model, max_sequences=sequences, kv_memory=limit)
    asked = finished = ended = cancelled = reused = 0

    def check(number: int, result: losart.GenerationResult) -> None:
        if number not in alone:
            prompt, options = request_of(number)
            memory.fails, fails = lambda: False, memory.fails
            alone[number] = model.generate(prompt, **options).token_ids
            memory.fails = fails
        assert result.token_ids == alone[number], request_of(number)[1]

    def run(until: int) -> None:
        nonlocal asked, finished, ended, cancelled, reused
        under_way: list[tuple[int, Stream]] = []
        while asked < until or under_way:
            if asked < until and len(under_way) < 24 and rng.random() < 0.3:
                asked += 1
                number = int(rng.integers(len(PROMPTS) * len(OPTIONS)))
                prompt, options = request_of(number)
                under_way.append((number, engine.submit(prompt, **options)))
            elif under_way:
                index = int(rng.integers(len(under_way)))
                number, stream = under_way[index]
                if rng.random() < 0.01:
                    stream.cancel()
                    cancelled += 1
                    del under_way[index]
                    continue
                try:
                    step = next(stream)
                except OutOfMemoryError:
                    ended += 1
                    del under_way[index]
                    continue
                if step.result is not None:
                    check(number, step.result)
                    finished += 1
                    reused += step.result.stats.reused_tokens > 0
                    del under_way[index]
                if limit is not None:
                    stats = engine.stats
                    assert stats.kv_bytes_in_use + stats.kv_bytes_held <= limit

    def resident_when_empty() -> int:
        stats = engine.stats
        assert (stats.running, stats.waiting, stats.kv_bytes_in_use) == (0, 0, 0)
        assert stats.kv_bytes_held == memory.in_use
        while engine._engine._pool.give_up():
            pass
        assert live() == others
        assert engine.stats.kv_bytes_held == memory.in_use == 0
        return resident()

    memory.fails = lambda: rng.random() < failures
    run(until=REQUESTS // 5 // 2)
    before = resident_when_empty()
    run(until=REQUESTS // 5)
    after = resident_when_empty()

    print(f"{asked} requests: {before >> 10} KiB after half of them, {after >> 10} KiB in the end")
    assert after - before < MOST_GROWTH
    assert finished + ended + cancelled == asked
    assert finished > asked // 2 and cancelled and reused
    assert (ended == 0) or failures
    assert bool(memory.refused) == bool(failures) and (engine.stats.set_back > 0) == (failures > 0)

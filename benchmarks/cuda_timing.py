"""Medians of what the device takes, by its own clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import cupy


def graph_microseconds(stream: Any, launch: Callable[[], object], calls: int, repeats: int = 15) -> float:
    """Median microseconds of one call, from replays of a graph of `calls` of them."""
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        launch()
        stream.synchronize()
        stream.begin_capture()
        kept = [launch() for _ in range(calls)]
        graph = stream.end_capture()
        elapsed = _median_microseconds(stream, lambda: graph.launch(stream), 0, repeats)
        del kept
    return elapsed / calls


def run_microseconds(stream: Any, run: Callable[[], object], warmups: int = 5, repeats: int = 15) -> float:
    """Median microseconds of a run that the host takes part in."""
    return _median_microseconds(stream, run, warmups, repeats)


def _median_microseconds(stream: Any, run: Callable[[], object], warmups: int, repeats: int) -> float:
    times = []
    for _ in range(warmups + repeats):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3)
    return statistics.median(times[warmups:])

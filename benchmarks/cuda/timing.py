"""Medians of what the device takes, by its own clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np


def graph_microseconds(stream: Any, launch: Callable[[], object], calls: int, repeats: int = 15) -> float:
    """Median microseconds of one call, from replays of a graph of `calls` of them."""
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        launch()
        stream.synchronize()
        stream.begin_capture()
        kept = [launch() for _ in range(calls)]
        graph = stream.end_capture()
        elapsed = run_microseconds(stream, lambda: graph.launch(stream), 0, repeats)
        del kept
    return elapsed / calls


_hold = cupy.RawKernel(
    """
    extern "C" __global__ void hold(long long nanoseconds)
    {
        long long began, now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
        do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        while (now - began < nanoseconds);
    }
    """,
    "hold",
)


def queued_microseconds(
    stream: Any, launch: Callable[[], object], calls: int, hold: float = 100, repeats: int = 5
) -> float:
    """Median microseconds of one call of many that cannot be captured.

    The stream first waits `hold` microseconds per call, so that the host, which needs less, stays ahead.
    """

    def run() -> None:
        for _ in range(calls):
            launch()

    with stream:
        launch()
        return run_microseconds(stream, run, 0, repeats, hold * calls) / calls


def run_microseconds(
    stream: Any, run: Callable[[], object], warmups: int = 5, repeats: int = 15, hold: float = 0
) -> float:
    """Median microseconds of a run that the host takes part in.

    Before each run the stream waits `hold` microseconds, so that a host that needs less stays ahead.
    """
    times = []
    for _ in range(warmups + repeats):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        if hold:
            _hold((1,), (1,), (np.int64(hold * 1e3),))
        begin.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3)
    return statistics.median(times[warmups:])

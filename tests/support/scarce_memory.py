"""Memory for KV caches that runs out, on the CPU, where it does not by itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from losart.backends.cpu.backend import CpuBackend
from losart.engine.kv_cache import PagedKVCache
from losart.errors import OutOfMemoryError

PLACES = ("cache", "chunk", "slot", "launch", "pass", "result")  # where memory can run out


class ScarceMemory:
    """Counts what caches allocate and what is freed of it, and refuses more than there is.

    Attributes
    ----------
    limit : float
        Bytes.
    in_use, most : int
        Bytes of arrays that live, and the most there were.
    refused : int
        Allocations so far.
    fails : callable
        Whether an allocation fails although there is memory.
    """

    def __init__(self) -> None:
        self.limit = float("inf")
        self.in_use = self.most = self.refused = 0
        self.fails: Callable[[], bool] = lambda: False

    def install(self, backend: Any, monkeypatch: Any) -> None:
        """Let a CPU backend's new caches allocate from here."""

        def new_cache(*sizes: Any) -> PagedKVCache:
            cache = CpuBackend.new_cache(backend, *sizes)
            allocate = cache._allocate
            cache._allocate = lambda *wanted: self._take(allocate, *wanted)
            return cache

        monkeypatch.setattr(backend, "new_cache", new_cache)

    def _take(self, allocate: Any, *wanted: Any) -> np.ndarray:
        array = allocate(*wanted)
        if self.in_use + array.nbytes > self.limit or self.fails():
            self.refused += 1
            raise MemoryError("no more of it")
        self.in_use += array.nbytes
        self.most = max(self.most, self.in_use)
        weakref.finalize(array, self._free, array.nbytes)
        return array

    def _free(self, size: int) -> None:
        self.in_use -= size


def fail_at(places: Callable[[str], bool], runner: Any, monkeypatch: Any) -> list[weakref.ref[Any]]:
    """Let memory run out in a runner where `places` says so, with what has been done until there done.

    Returns the slots that it gives.
    """
    new_cache, new_slot, begin = runner.new_cache, runner.new_slot, runner.begin
    slots = []

    def check(place: str) -> None:
        if places(place):
            raise OutOfMemoryError(f"no memory for a {place}")

    def failing_cache(*arguments: Any) -> PagedKVCache:
        check("cache")
        return new_cache(*arguments)

    def failing_slot(options: Any) -> Any:
        check("slot")
        if (slot := new_slot(options)) is not None:
            slots.append(weakref.ref(slot))
        return slot

    def failing_begin(*arguments: Any) -> Callable[[], Any]:
        check("launch")
        finish = begin(*arguments)
        check("pass")

        def failing_finish() -> Any:
            result = finish()
            check("result")
            return result

        return failing_finish

    for name, fails in (("new_cache", failing_cache), ("new_slot", failing_slot), ("begin", failing_begin)):
        monkeypatch.setattr(runner, name, fails)
    return slots

"""Passes on a device, each a CUDA graph that is captured when it comes again, and the memory that they use.

The host tells a pass its ids, random numbers and the prefix's length through device buffers that stay in
place, so that a captured pass can be replayed as the prefix grows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassInputs
from losart.backends.cuda.graph import CapturedPass, PassBuffers, capture, outside_passes
from losart.backends.cuda.pages import PagesInPlace
from losart.backends.cuda.weights import memory_errors
from losart.engine.kv_cache import PagedKVCache
from losart.engine.sampling import NOT_FINITE, Proposals
from losart.errors import NumericalError, OutOfMemoryError

CAPTURED_PASSES = 32  # kept, of those used last


class CudaPasses:
    """Runs passes and pieces of a prompt on the current device.

    Parameters
    ----------
    max_positions : int

    Attributes
    ----------
    device : cupy.cuda.Device
    stream : cupy.cuda.Stream
        All work is on it.
    counted : bool
        Whether the pass counts the positions that it reads.
    captures : bool
        Whether the pass can be captured: the host takes no part in it.
    blas : bool
        Whether products of many tokens may go to cuBLAS, where no kernel of ours does as well: in prefill,
        for it cannot be captured.
    """

    def __init__(self, max_positions: int) -> None:
        self.device = cupy.cuda.Device()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        # What passes allocate from, and captured graphs hold addresses of.
        self._pool = cupy.cuda.MemoryPool(self._allocate)
        # What pieces of a prompt allocate from: much, which the next pass or chunk of a cache gives back.
        self._prefill_pool = cupy.cuda.MemoryPool(_from_driver)
        # None where one has been run once: it is captured when it comes again.
        self._passes: OrderedDict[Hashable, CapturedPass | None] = OrderedDict()
        self._lock = threading.RLock()
        self._buffers: dict[int, PassBuffers] = {}
        with self.stream:
            self._pages = PagesInPlace(max_positions)
        self.counted, self.captures, self.blas = False, True, False

    @contextmanager
    def _running(self, purpose: str) -> Iterator[None]:
        """On the backend's device and stream, one thread at a time."""
        with self._lock, self.device, self.stream, memory_errors(purpose):
            yield

    def _allocate(self, size: int) -> Any:
        """Memory for the pool of passes.

        When there is none, CuPy frees the pool's free blocks, and captured graphs work in those: first
        the cached blocks of all else go, and then the graphs.
        """
        try:
            return _from_driver(size)
        except cupy.cuda.runtime.CUDARuntimeError:
            self._passes.clear()
            raise

    def run_pass(
        self, shape: Hashable, inputs: PassInputs, cache: PagedKVCache, body: Callable[[Any], Any]
    ) -> tuple[Any, int]:
        tokens = len(inputs.ids)
        cache.reserve(cache.length + tokens)
        with self._running("a pass"), cupy.cuda.using_allocator(self._pool.malloc):
            self._prefill_pool.free_all_blocks()
            self._place(inputs, cache)
            key = (shape, tokens, cache.page_size, cache.table.positions_per_chunk)
            captured = self._captured(key, body)
            if captured is not None:
                captured.launch()
                return self._fetch(inputs, captured.proposes, captured.counts)
            # By launches, which compiles the kernels and fills the pool.
            self.counted, self.captures = False, True
            proposes = body(self._given.ids) is not None
            if not self.captures:
                self._passes.pop(key, None)  # as if it had never come; out of memory, all are dropped
            return self._fetch(inputs, proposes, self.counted)

    def _captured(self, key: Hashable, body: Callable[[Any], Any]) -> CapturedPass | None:
        """The captured pass of this key; None when it comes for the first time, or there is no memory."""
        passes = self._passes
        if key not in passes:
            passes[key] = None
        elif passes[key] is None:
            with suppress(OutOfMemoryError), memory_errors("a captured pass"):
                passes[key] = self._capture(body)
        captured = passes.setdefault(key, None)  # out of memory, all are dropped
        passes.move_to_end(key)
        if len(passes) > CAPTURED_PASSES:
            passes.popitem(last=False)
        return captured

    def _capture(self, body: Callable[[Any], Any]) -> CapturedPass:
        self.counted = False
        graph, given = capture(self.stream, lambda: body(self._given.ids))
        return CapturedPass(self.stream, graph, given is not None, self.counted)

    def run_prefill(self, ids: np.ndarray, cache: PagedKVCache, body: Callable[[Any], Any]) -> None:
        cache.reserve(cache.length + len(ids))
        with self._running("a piece of the prompt"), cupy.cuda.using_allocator(self._prefill_pool.malloc):
            self._place(PassInputs(ids), cache)
            self.blas = True
            try:
                body(self._given.ids)
            finally:
                self.blas = False
            self.stream.synchronize()

    def _place(self, inputs: PassInputs, cache: PagedKVCache) -> None:
        """Bring the pass's inputs to where its kernels look for them."""
        tokens = len(inputs.ids)
        if tokens not in self._buffers:
            with outside_passes():
                self._buffers[tokens] = PassBuffers(tokens)
        self._given = self._buffers[tokens]
        self._given.set(inputs, cache.length, self.stream)
        self._pages.place(cache.table, self.stream)

    def _fetch(self, inputs: PassInputs, proposes: bool, counts: bool) -> tuple[Proposals | None, int]:
        """The pass's proposals, if it makes any, and the positions that sparse attention read."""
        if not proposes and not counts:
            return None, 0
        positions, results = self._given.get()
        if not proposes:
            return None, positions
        tokens, confidence, entropy, finite = results[:, : len(inputs.rows)]
        if not finite.all():
            raise NumericalError(NOT_FINITE)
        proposals = Proposals(tokens.astype(np.int64), confidence.view(np.float32), entropy.view(np.float32))
        return proposals, positions


def _from_driver(size: int) -> Any:
    """Memory for a pool; if need be of what the default one has cached, such as chunks of past caches."""
    memory = cupy.cuda.memory
    try:
        return memory.MemoryPointer(memory.Memory(size), 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        cupy.get_default_memory_pool().free_all_blocks()
    return memory.MemoryPointer(memory.Memory(size), 0)

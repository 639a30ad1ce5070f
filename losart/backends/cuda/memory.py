"""The device's memory: where arrays come from, and what happens when there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cupy

from losart.errors import OutOfMemoryError

# Errors that may mean it, and the status by which they do.
OUT_OF_MEMORY = {"OutOfMemoryError": 0, "CUDARuntimeError": 2, "CUDADriverError": 2, "CUBLASError": 3}


class DeviceMemory:
    """The current device, one stream for all work on it, and the pools that arrays are allocated from.

    Arrays that outlive a pass come from CuPy's default pool. A captured graph goes on writing to the memory
    that it was captured with after the pool has taken it back, so only other passes may be given that memory.

    Attributes
    ----------
    device : cupy.cuda.Device
    stream : cupy.cuda.Stream
    lock : threading.RLock
    pass_pool : cupy.cuda.MemoryPool
        For passes over a block.
    prefill_pool : cupy.cuda.MemoryPool
        For pieces of a prompt, which take much; the next pass or cache chunk gives it back.
    drop_graphs : callable
        Drops captured graphs; called when the memory that they work in is about to be freed.
    """

    def __init__(self) -> None:
        self.device = cupy.cuda.Device()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.pass_pool = cupy.cuda.MemoryPool(self._allocate)
        self.prefill_pool = cupy.cuda.MemoryPool(_from_driver)
        self.drop_graphs: Callable[[], None] = lambda: None
        self.lock = threading.RLock()

    @contextmanager
    def running(self, purpose: str, pool: Any | None = None) -> Iterator[None]:
        """On the device and stream, one thread at a time, with arrays from a pool (None: the default one)."""
        pool = pool or cupy.get_default_memory_pool()
        allocator = cupy.cuda.using_allocator(pool.malloc)
        with self.lock, self.device, self.stream, allocator:
            try:
                yield
            except Exception as error:
                _raise_out_of_memory(error, purpose)
                raise

    def _allocate(self, size: int) -> Any:
        """Memory for the pool of passes.

        If this fails, CuPy frees the pool's unused blocks, and captured graphs work in those: what the
        default pool has cached is given up first, and then the graphs.
        """
        try:
            return _from_driver(size)
        except cupy.cuda.runtime.CUDARuntimeError:
            self.drop_graphs()
            raise


def _raise_out_of_memory(error: Exception, purpose: str) -> None:
    """Turn an out-of-memory error of CuPy, the driver or cuBLAS into our own; others do not matter."""
    status = OUT_OF_MEMORY.get(type(error).__name__)
    if status is not None and status == getattr(error, "status", status):
        free, total = cupy.cuda.runtime.memGetInfo()
        raise OutOfMemoryError(
            f"no memory for {purpose}: {error}, {free >> 20} of the device's {total >> 20} MiB are free"
        ) from error


def _from_driver(size: int) -> Any:
    """Memory for a pool, if need be of what the default one has cached, such as chunks of past caches."""
    memory = cupy.cuda.memory
    try:
        return memory.MemoryPointer(memory.Memory(size), 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        cupy.get_default_memory_pool().free_all_blocks()
    return memory.MemoryPointer(memory.Memory(size), 0)

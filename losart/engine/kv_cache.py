"""The paged KV cache of one sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from losart.config.precision import GROUP_PAGES, Format
from losart.errors import OutOfMemoryError

CHUNK_POSITIONS, SMALL_CHUNK_POSITIONS = 1024, 256
FEW_POSITIONS = 8192


def chunk_positions(page_size: int, expected: int | None = None) -> int:
    """Positions of a chunk: enough, and whole groups of pages.

    Where few are `expected` (None: nobody knows) it is less, so that little memory is left empty; attention
    over many reads larger chunks faster.
    """
    group = GROUP_PAGES * page_size
    few = expected is not None and expected <= FEW_POSITIONS
    return math.ceil((SMALL_CHUNK_POSITIONS if few else CHUNK_POSITIONS) / group) * group


class HostArrays:
    """What is done with the arrays of chunks beside passes, in the host's memory."""

    def copy(self, to: Any, at: int, source: Any, start: int, axis: int, count: int) -> None:
        """Copy `count` along an axis, from `start` on, to where `at` is."""
        before = (slice(None),) * axis
        to[(*before, slice(at, at + count))] = source[(*before, slice(start, start + count))]

    def to_host(self, array: Any) -> np.ndarray:
        """The array, or a copy of it on the host."""
        return array

    def from_host(self, values: np.ndarray, shape: tuple[int, ...], format: Format) -> Any:
        """Bytes on the host as an array of a cache, which may be the same memory."""
        return values.view(format.array).reshape(shape)


class PagedKVCache:
    """Keys, values and page key bounds of the committed prefix, allocated in chunks as it grows.

    Parameters
    ----------
    table : PageTable
        Where the pages lie: the backend's own, with `page_size`, `positions_per_chunk`, `capacity`,
        `kv_format`, `kv_shape`, `bounds_format`, `bounds_shape` and `add_chunk`.
    allocate : callable
        (shape, format) -> an array of zeros.
    arrays : HostArrays, optional
        Or what does the same with the backend's arrays.

    Attributes
    ----------
    length : int
        Committed positions. The block being denoised begins here.
    chunks : list of tuple
        Arrays of keys and values, and of page bounds. Those that `length` is past are never written again.
    """

    def __init__(
        self,
        table: Any,
        allocate: Callable[[tuple[int, ...], Format], Any],
        arrays: HostArrays | None = None,
    ) -> None:
        self.table = table
        self.length = 0
        self.shared_chunks = 0  # that another one had, of the first ones
        self.chunks: list[tuple[Any, Any]] = []
        self._allocate = allocate
        self.arrays = arrays or HostArrays()

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return self.table.page_size

    @property
    def positions_per_chunk(self) -> int:
        """Positions that are allocated at a time."""
        return self.table.positions_per_chunk

    @property
    def pages(self) -> int:
        """Pages of the prefix, the last one perhaps part full."""
        return -(-self.length // self.page_size)

    @property
    def chunk_bytes(self) -> int:
        """Memory that a chunk takes."""
        table = self.table
        kv, bounds = math.prod(table.kv_shape), math.prod(table.bounds_shape)
        return kv * table.kv_format.itemsize + bounds * table.bounds_format.itemsize

    @property
    def nbytes(self) -> int:
        """Memory of its chunks."""
        return sum(kv.nbytes + bounds.nbytes for kv, bounds in self.chunks)

    @property
    def shared_bytes(self) -> int:
        """Of that, chunks that another one had when this one began."""
        return sum(kv.nbytes + bounds.nbytes for kv, bounds in self.chunks[: self.shared_chunks])

    def bytes_for(self, positions: int) -> int:
        """Memory that this many positions take, in whole chunks."""
        return -(-positions // self.table.positions_per_chunk) * self.chunk_bytes

    def reserve(self, positions: int) -> None:
        """Make room for this many positions in all.

        Raises
        ------
        OutOfMemoryError
            When a chunk cannot be allocated; what the cache holds stays valid.
        """
        while self.table.capacity < positions:
            try:
                chunk = self._new_chunk()
            except MemoryError as error:
                missing = -(-(positions - self.table.capacity) // self.table.positions_per_chunk)
                raise OutOfMemoryError(
                    f"no memory for {positions} positions of the KV cache: there is room for "
                    f"{self.table.capacity}, {missing * self.chunk_bytes >> 20} MiB more are needed "
                    f"({error})"
                ) from error
            self._add(chunk)

    def _new_chunk(self) -> tuple[Any, Any]:
        table = self.table
        return (
            self._allocate(table.kv_shape, table.kv_format),
            self._allocate(table.bounds_shape, table.bounds_format),
        )

    def _add(self, chunk: tuple[Any, Any]) -> None:
        self.table.add_chunk(*chunk)
        self.chunks.append(chunk)

    def share(self, chunks: Sequence[tuple[Any, Any]], positions_per_chunk: int, positions: int) -> None:
        """Begin with what another cache, of the same page size, holds.

        Parameters
        ----------
        chunks : sequence of tuple
            The other's. Those that the positions fill are shared, and the rest is copied; all is where the
            other's chunks have another size.
        positions_per_chunk : int
            The other's.
        positions : int
            Whole pages, and a multiple of the block length.

        Raises
        ------
        MemoryError
            When the copy cannot be allocated; the cache stays empty.
        """
        own, group = self.positions_per_chunk, GROUP_PAGES * self.page_size
        shared = list(chunks[: positions // own]) if positions_per_chunk == own else []
        count_shared = len(shared)
        copied = own * count_shared
        # No more than these positions: what comes after them in the other may not be finite.
        while copied < positions:
            at, start = copied % own, copied % positions_per_chunk  # whole groups, as chunks are
            count = min(positions - copied, own - at, positions_per_chunk - start)
            if not at:
                shared.append(self._new_chunk())
            source = chunks[copied // positions_per_chunk]
            for to, other, axis, unit in zip(shared[-1], source, (3, 2), (1, group), strict=True):
                self.arrays.copy(to, at // unit, other, start // unit, axis, -(-count // unit))
            copied += count
        for chunk in shared:
            self._add(chunk)
        self.shared_chunks = count_shared
        self.length = positions

    def emptied(self) -> PagedKVCache:
        """What is left of it when a sequence has ended: the length. No pass can read or write it."""
        left = PagedKVCache(None, self._allocate)
        left.length = self.length
        return left

    def advance(self, tokens: int) -> None:
        """Take `tokens` positions into the prefix: their keys and values are written in all layers."""
        self.length += tokens

"""A pool of KV caches: what sequences begin with in common is held once, also after they have ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from losart.engine.sequence import Sequence
from losart.errors import OutOfMemoryError

Chunk = tuple[Any, Any]  # keys and values, and page bounds


def common_length(a: Ids[int] | np.ndarray, b: Ids[int] | np.ndarray) -> int:
    """How many ids two sequences begin with in common."""
    shorter = min(len(a), len(b))
    differ = np.asarray(a[:shorter]) != np.asarray(b[:shorter])
    return int(differ.argmax()) if differ.any() else shorter


@dataclass(frozen=True)
class PrefixKind:
    """What prefixes must agree in, beside their ids, for one to serve as the other.

    Keys and values depend on the block length, since a token sees all of its block.
    """

    block_length: int
    page_size: int

    @classmethod
    def of(cls, sequence: Sequence) -> PrefixKind:
        """That of a sequence's cache."""
        return cls(sequence.options.block_length, sequence.cache.page_size)

    def whole(self, positions: int) -> int:
        """Of so many positions those in whole pages and whole blocks."""
        step = math.lcm(self.page_size, self.block_length)
        return positions // step * step


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of a beginning that some sequences may have in common.

    Attributes
    ----------
    kind : PrefixKind
    positions_per_chunk : int
    ids : int64 [positions]
        Whole pages and blocks.
    chunks : sequence of Chunk
        That hold them; what the last one has after them is of no use.
    checked : bool
        Whether logits were finite that came of it.
    """

    kind: PrefixKind
    positions_per_chunk: int
    ids: np.ndarray
    chunks: Ids[Chunk]
    checked: bool = True

    def first(self, positions: int) -> Prefix:
        """The beginning of it."""
        chunks = self.chunks[: -(-positions // self.positions_per_chunk)]
        return replace(self, ids=self.ids[:positions], chunks=chunks)

    def full_chunks(self, positions_per_chunk: int) -> int:
        """How many of its chunks a cache with chunks of this size can share."""
        same = positions_per_chunk == self.positions_per_chunk
        return len(self.ids) // positions_per_chunk if same else 0


class KVPool:
    """The caches of an engine's running sequences, and prefixes of those that have ended.

    A sequence that joins shares the chunks that are full of what it has in common with another one, running
    or ended, and gets a copy of the part of a chunk that follows; of all, if their chunks differ in size. All
    is done under the engine's lock.

    Parameters
    ----------
    kept : int
        Prefixes that are held for nobody at most, those used last, where there is no limit.
    limit : int, optional
        Bytes of keys, values and page bounds. A sequence joins when all that it may need in the end fits
        beside what the others may, and prefixes that are held for nobody make room.

    Attributes
    ----------
    reused_tokens : int
        That sequences have found when they joined, so far.
    """

    def __init__(self, kept: int, limit: int | None = None) -> None:
        self.kept = kept
        self.limit = limit
        self.reused_tokens = 0
        self._running: list[Sequence] = []
        self._held: dict[Prefix, None] = {}  # in the order of their last use

    @property
    def bytes_in_use(self) -> int:
        """Memory of the running sequences' caches, what they share counted once."""
        return sum(_sizes(one.cache.chunks for one in tuple(self._running)).values())

    @property
    def bytes_held(self) -> int:
        """Memory of prefixes beside that, held for nobody."""
        used = _sizes(one.cache.chunks for one in tuple(self._running))
        return sum(size for chunk, size in self._held_sizes().items() if chunk not in used)

    @property
    def bytes_shared(self) -> int:
        """Memory that the running sequences' caches would take more, did they share nothing."""
        chunks = [chunk for one in tuple(self._running) for chunk in one.cache.chunks]
        return sum(kv.nbytes + bounds.nbytes for kv, bounds in chunks) - sum(_sizes([chunks]).values())

    def check(self, sequence: Sequence) -> None:
        """Refuse a sequence that can never join.

        Raises
        ------
        OutOfMemoryError
        """
        need = sequence.cache.bytes_for(sequence.end)
        if self.limit is not None and need > self.limit:
            raise OutOfMemoryError(
                f"the KV cache of prompt and answer, {sequence.end} positions in chunks of "
                f"{sequence.cache.positions_per_chunk}, takes {need} bytes, and kv_memory is {self.limit}"
            )

    def join(self, sequence: Sequence) -> bool:
        """Give a sequence's empty cache what is held of its prefix; False: there is no room for it yet."""
        found = self._find(sequence)
        # While something is copied there are two of it: where that is too much, whole chunks serve.
        for shared in (found, _without_copies(found, sequence.cache.positions_per_chunk)):
            if self.limit is None or self._make_room(*self._planned(sequence, shared)):
                try:
                    sequence.cache.share(shared.chunks, shared.positions_per_chunk, len(shared.ids))
                except MemoryError:
                    continue
                sequence.found = len(shared.ids)
                if not sequence.begun:
                    sequence.reused = sequence.found
                self.reused_tokens += sequence.found
                self._running.append(sequence)
                return True
        return False

    def _planned(
        self, sequence: Sequence | None = None, found: Prefix | None = None
    ) -> tuple[int, dict[int, int]]:
        """Bytes that running sequences may need, and one more that shares a prefix; and what they have."""
        caches = [(one.cache, len(one.cache.chunks), one.end) for one in tuple(self._running)]
        used = _sizes(cache.chunks for cache, *_ in caches)
        if sequence is not None and found is not None:
            used |= _sizes([found.chunks])
            full = found.full_chunks(sequence.cache.positions_per_chunk)
            caches.append((sequence.cache, full, sequence.end))
        to_come = (cache.bytes_for(end) - count * cache.chunk_bytes for cache, count, end in caches)
        return sum(used.values()) + sum(to_come), used

    def _make_room(self, planned: int, used: dict[int, int]) -> bool:
        """Whether what is planned fits, if need be where prefixes were held for nobody."""
        while self.limit is not None:
            if planned > self.limit:
                return False
            beside = sum(size for chunk, size in self._held_sizes().items() if chunk not in used)
            if planned + beside <= self.limit:
                break
            self.give_up()
        return True

    def _held_sizes(self) -> dict[int, int]:
        return _sizes(prefix.chunks for prefix in tuple(self._held))

    def leave(self, sequence: Sequence, keep: bool) -> Prefix | None:
        """Take a sequence out, and with `keep` hold what its cache has for others to come, if anything.

        Returns what is held.
        """
        if sequence not in self._running:
            return None
        self._running.remove(sequence)
        if not keep:
            return None
        kind, cache = PrefixKind.of(sequence), sequence.cache
        ids, checked = sequence.shareable(), sequence.checked
        whole = Prefix(kind, cache.positions_per_chunk, ids, tuple(cache.chunks), checked)
        prefix = whole.first(kind.whole(len(ids)))
        if not len(prefix.ids):
            return None
        self.hold(prefix)
        return prefix

    def make_room(self, size: int) -> None:
        """Give up what is held, until so many bytes more can be.

        Raises
        ------
        OutOfMemoryError
            Running sequences may need too much.
        """
        planned, used = self._planned()
        if not self._make_room(planned + size, used):
            raise OutOfMemoryError(
                f"the prefix takes {size} bytes, generations under way may take {planned}, and kv_memory is "
                f"{self.limit}"
            )

    def hold(self, prefix: Prefix) -> None:
        """Hold a prefix, for which there is room, until memory is wanted."""
        for held in tuple(self._held):
            if (held.kind, held.positions_per_chunk) == (prefix.kind, prefix.positions_per_chunk):
                common = common_length(held.ids, prefix.ids)
                if common == len(prefix.ids):
                    self._used(held)
                    return
                if common == len(held.ids):
                    self._held.pop(held, None)
        self._held[prefix] = None
        while self.limit is None and len(self._held) > self.kept:
            self.give_up()

    def give_up(self) -> bool:
        """Give up the prefix that is held for nobody and was used least recently; False: there is none."""
        least = next(iter(tuple(self._held)), None)
        if least is not None:
            self._held.pop(least, None)
        return least is not None

    def give_up_unchecked(self) -> None:
        """Give up what no logits came of: where some are not finite, it may be the cause."""
        for held in tuple(self._held):
            if not held.checked:
                self._held.pop(held, None)

    def awaits(self, sequence: Sequence) -> bool:
        """Whether a prefill that is under way will have more in common with a sequence than there is now."""
        if sequence.awaited is not None:  # asked before every pass, of each that waits
            other, positions = sequence.awaited
            if other in self._running and other.cache.length < positions:
                return True
            sequence.awaited = None
        kind = PrefixKind.of(sequence)
        soon = [
            (one, kind.whole(common_length(one.prefix, sequence.prefix)))
            for one in tuple(self._running)
            if one.cache.length < one.prefill_end and PrefixKind.of(one) == kind
        ]
        most = max(soon, key=lambda found: found[1], default=(sequence, 0))
        if most[1] and most[1] > len(self._find(sequence).ids):
            sequence.awaited = most
        return sequence.awaited is not None

    def _find(self, sequence: Sequence) -> Prefix:
        """The longest beginning of a sequence's prefix that there is, perhaps of no ids."""
        kind, per_chunk = PrefixKind.of(sequence), sequence.cache.positions_per_chunk
        source, best = Prefix(kind, per_chunk, sequence.prefix[:0], ()), (0, False)
        for prefix in self._prefixes(kind):
            common = kind.whole(common_length(prefix.ids, sequence.prefix))
            found = common, prefix.positions_per_chunk == per_chunk  # which is shared, and not copied
            if common and found > best:
                source, best = prefix, found
        self._used(source)
        return source.first(best[0])

    def _prefixes(self, kind: PrefixKind) -> Iterator[Prefix]:
        for one in tuple(self._running):
            if PrefixKind.of(one) == kind:
                cache = one.cache
                yield Prefix(kind, cache.positions_per_chunk, one.prefix[: cache.length], cache.chunks)
        yield from (held for held in tuple(self._held) if held.kind == kind)

    def _used(self, prefix: Prefix) -> None:
        if self._held.pop(prefix, False) is None:  # another thread may give it up
            self._held[prefix] = None


def _without_copies(prefix: Prefix, positions_per_chunk: int) -> Prefix:
    """Of a prefix what fills chunks of this size, if these are whole blocks."""
    positions = prefix.full_chunks(positions_per_chunk) * positions_per_chunk
    return prefix.first(positions if prefix.kind.whole(positions) == positions else 0)


def _sizes(caches: Iterable[Ids[Chunk]]) -> dict[int, int]:
    """Bytes of the chunks of some caches, by what identifies a chunk."""
    return {id(kv): kv.nbytes + bounds.nbytes for chunks in caches for kv, bounds in chunks}

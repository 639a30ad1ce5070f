"""A pool of KV caches: what sequences begin with in common is held once, also after they have ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any

import numpy as np

from losart.engine.sequence import Sequence

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
    positions_per_chunk: int

    @classmethod
    def of(cls, sequence: Sequence) -> PrefixKind:
        """That of a sequence's cache."""
        cache = sequence.cache
        return cls(sequence.options.block_length, cache.page_size, cache.positions_per_chunk)

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
    ids : int64 [positions]
        Whole pages and blocks.
    chunks : sequence of Chunk
        That hold them; what the last one has after them is of no use.
    """

    kind: PrefixKind
    ids: np.ndarray
    chunks: Ids[Chunk]


class KVPool:
    """The caches of an engine's running sequences, and prefixes of those that have ended.

    A sequence that joins shares the chunks that are full of what it has in common with another one, running
    or ended, and gets a copy of the part of a chunk that follows. All is done under the engine's lock.

    Parameters
    ----------
    kept : int
        Prefixes that are held for nobody, at most; those used last.

    Attributes
    ----------
    reused_tokens : int
        That sequences have found when they joined, so far.
    """

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.reused_tokens = 0
        self._running: list[Sequence] = []
        self._held: dict[Prefix, None] = {}  # in the order of their last use

    def join(self, sequence: Sequence) -> None:
        """Give a sequence's empty cache what is held of its prefix.

        Raises
        ------
        MemoryError
            The part of a chunk cannot be copied, although nothing is held for nobody any more; the cache
            stays empty.
        """
        while True:
            found = self._find(sequence)
            try:
                sequence.cache.share(found.chunks, len(found.ids))
                break
            except MemoryError:
                if not self.give_up():
                    raise
        if not sequence.begun:
            sequence.reused = len(found.ids)
        self.reused_tokens += len(found.ids)
        self._running.append(sequence)

    def leave(self, sequence: Sequence, keep: bool) -> None:
        """Take a sequence out, and with `keep` hold what its cache has for others to come."""
        if sequence not in self._running:
            return
        self._running.remove(sequence)
        if keep:
            kind, cache = PrefixKind.of(sequence), sequence.cache
            ids = sequence.shareable()
            ids = ids[: kind.whole(len(ids))]
            chunks = cache.chunks[: -(-len(ids) // kind.positions_per_chunk)]
            self.hold(Prefix(kind, ids, tuple(chunks)))

    def hold(self, prefix: Prefix) -> None:
        """Hold a prefix until memory is wanted."""
        for held in tuple(self._held):
            if held.kind == prefix.kind:
                common = common_length(held.ids, prefix.ids)
                if common == len(prefix.ids):
                    self._used(held)
                    return
                if common == len(held.ids):
                    self._held.pop(held, None)
        self._held[prefix] = None
        while len(self._held) > self.kept:
            self.give_up()

    def give_up(self) -> bool:
        """Give up the prefix that is held for nobody and was used least recently; False: there is none."""
        least = next(iter(tuple(self._held)), None)
        if least is not None:
            self._held.pop(least, None)
        return least is not None

    def awaits(self, sequence: Sequence) -> bool:
        """Whether a prefill that is under way will have more in common with a sequence than there is now."""
        kind = PrefixKind.of(sequence)
        soon = [
            kind.whole(common_length(one.prefix, sequence.prefix))
            for one in tuple(self._running)
            if one.cache.length < one.prefill_end and PrefixKind.of(one) == kind
        ]
        return max(soon, default=0) > 0 and max(soon) > len(self._find(sequence).ids)

    def _find(self, sequence: Sequence) -> Prefix:
        """The longest beginning of a sequence's prefix that there is, perhaps of no ids."""
        kind = PrefixKind.of(sequence)
        source, most = Prefix(kind, sequence.prefix[:0], ()), 0
        for prefix in self._prefixes(kind):
            common = kind.whole(common_length(prefix.ids, sequence.prefix))
            if common > most:
                source, most = prefix, common
        self._used(source)
        return Prefix(kind, source.ids[:most], source.chunks)

    def _prefixes(self, kind: PrefixKind) -> Iterator[Prefix]:
        for one in tuple(self._running):
            if PrefixKind.of(one) == kind:
                yield Prefix(kind, one.prefix[: one.cache.length], one.cache.chunks)
        yield from (held for held in tuple(self._held) if held.kind == kind)

    def _used(self, prefix: Prefix) -> None:
        if prefix in self._held:
            self._held[prefix] = self._held.pop(prefix)

"""Writes what a pass needs to know of its sequences to where the copy to the device takes it from."""

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint64_t

cdef int64_t LEAST_PART_TILES = 4


def divide_prefixes(
    const int32_t[::1] lengths, Py_ssize_t riding, plan, int32_t[::1] starts, int32_t[::1] owners
):
    """Write which parts of dense prefix attention are whose.

    Parameters
    ----------
    lengths : int32 [sequences]
        Of the prefixes.
    riding : int
        The first caches that have two sequences, of which the second sees the longer prefix.
    plan : Plan
    starts : int32 [caches + 1 or more]
        Takes every cache's first part, and the end of the last one.
    owners : int32 [plan.parts]
        Takes every part's cache, -1 for none.

    Raises
    ------
    ValueError
        Arrays are too short.
    """
    cdef Py_ssize_t caches = lengths.shape[0] - riding, parts = plan.parts, share = plan.share, cache, part = 0
    cdef int64_t tile = plan.tile, tiles, count, total = 0
    if riding < 0 or 2 * riding > lengths.shape[0] or starts.shape[0] <= caches or owners.shape[0] < parts:
        raise ValueError(f"no room for {caches} caches and {parts} parts")
    if tile:
        for cache in range(caches):
            total += (lengths[seen(cache, riding)] + tile - 1) // tile
    for cache in range(caches):
        count = share
        if tile:
            tiles = (lengths[seen(cache, riding)] + tile - 1) // tile
            count = (tiles * (parts - caches) + max(1, total) - 1) // max(1, total)
            count = min(max(1, count), max(1, tiles // LEAST_PART_TILES))
        starts[cache] = <int32_t>part
        if part + count > parts:
            raise ValueError(f"{caches} caches have more than {parts} parts")
        for _ in range(count):
            owners[part] = <int32_t>cache
            part += 1
    starts[caches] = <int32_t>part
    for i in range(part, parts):
        owners[i] = -1


cdef inline Py_ssize_t seen(Py_ssize_t cache, Py_ssize_t riding) noexcept:
    """The sequence of a cache that sees all of its prefix."""
    return 2 * cache + 1 if cache < riding else cache + riding


cdef class PassInputs:
    """Arrays of a pass's sequences and rows.

    Parameters
    ----------
    slots, tables : uint64 [sequences]
        Addresses of stored results and of page tables, 0 for none.
    lengths : int32 [sequences]
        Of the prefixes.
    ids, positions, is_masked : int32 [rows]
    proposed : int32 [proposing rows]
        Rows that propose tokens, one after the other.
    """

    cdef uint64_t[::1] slots, tables
    cdef int32_t[::1] lengths, ids, positions, is_masked, proposed

    def __init__(
        self,
        uint64_t[::1] slots,
        uint64_t[::1] tables,
        int32_t[::1] lengths,
        int32_t[::1] ids,
        int32_t[::1] positions,
        int32_t[::1] is_masked,
        int32_t[::1] proposed,
    ):
        self.slots, self.tables, self.lengths = slots, tables, lengths
        self.ids, self.positions, self.is_masked, self.proposed = ids, positions, is_masked, proposed

    def fill(
        self,
        sequences,
        Py_ssize_t tokens,
        Py_ssize_t padded,
        uint64_t scratch,
        stream,
        Py_ssize_t first,
        Py_ssize_t row,
        Py_ssize_t proposed,
    ):
        """Write a group's sequences, and what pads them.

        Parameters
        ----------
        sequences : sequence of SequencePass
            Of so many `tokens` each.
        tokens, padded : int
            Rows of a sequence, and sequences with those that pad the group.
        scratch : int
            Address of a slot for those.
        stream : Stream
            On which page tables are brought up to date.
        first, row, proposed : int
            Sequences, rows and proposing rows of the groups before.

        Returns
        -------
        int
            Proposing rows of this group and those before.

        Raises
        ------
        ValueError
            A sequence has another number of rows, or there are more sequences, rows or proposing rows than places.
        """
        cdef Py_ssize_t used = len(sequences), i, position
        cdef int32_t length
        if min(first, row, proposed) < 0 or tokens < 1:
            raise ValueError("places are counted from 0, rows from 1")
        if used > padded or first + padded > self.lengths.shape[0] or row + padded * tokens > self.ids.shape[0]:
            raise ValueError(f"no room for {used} sequences of {tokens} rows")
        for one in sequences:
            slot, ids = one.slot, one.ids
            if len(ids) != tokens:
                raise ValueError(f"a sequence has {len(ids)} rows, and others of its group {tokens}")
            length = one.prefix_length
            self.slots[first] = 0 if slot is None else slot.address
            self.tables[first] = one.cache.table.place(stream)
            self.lengths[first] = length
            if isinstance(ids, np.ndarray):
                np.asarray(self.ids)[row : row + tokens] = ids
            else:
                for i, token in enumerate(ids):
                    self.ids[row + i] = token
            for i in range(tokens):
                self.positions[row + i] = length + <int32_t>i
                self.is_masked[row + i] = 0
            if proposed + len(one.proposed) > self.proposed.shape[0]:
                raise ValueError("there are more rows that propose tokens than places")
            for position in one.proposed:
                if not 0 <= position < tokens:
                    raise ValueError(f"row {position} of {tokens} cannot propose a token")
                self.proposed[proposed] = <int32_t>(row + position)
                proposed += 1
            for position in one.masked:
                if not 0 <= position < tokens:
                    raise ValueError(f"row {position} of {tokens} cannot be masked")
                self.is_masked[row + position] = 1
            first += 1
            row += tokens
        for _ in range(padded - used):
            self.slots[first], self.tables[first], self.lengths[first] = scratch, 0, 0
            for i in range(tokens):
                self.ids[row + i], self.positions[row + i], self.is_masked[row + i] = 0, <int32_t>i, 0
            first += 1
            row += tokens
        return proposed

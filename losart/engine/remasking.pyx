"""Which proposals a pass fixes: remasking (SDAR, arXiv 2510.06303, and its published script)."""

import numpy as np

from libc.stdint cimport int64_t


def remask(proposals, passes):
    """The blocks after a pass: the proposals that `choose` takes are in their places.

    Parameters
    ----------
    proposals : Proposals
    passes : sequence of SequencePass
        Whose masked rows they are for, one after the other; their ids and masked rows are lists.

    Returns
    -------
    list of (list of int, list of int)
        Of each: the block, and where it is still masked.

    Raises
    ------
    ValueError
        There are more or fewer proposals than masked rows.
    """
    cdef const unsigned char[::1] chosen = choose(proposals, passes).view(np.uint8)
    cdef const int64_t[::1] tokens = np.ascontiguousarray(proposals.tokens, np.int64)
    cdef Py_ssize_t first = 0, row
    cdef list block, masked, left, after = []
    if tokens.shape[0] != chosen.shape[0]:
        raise ValueError("there must be a proposal for each masked row")
    for one in passes:
        block, masked, left = list(one.ids), one.masked, []
        for row in masked:
            if not 0 <= row < len(block):
                raise ValueError(f"row {row} of {len(block)} cannot be masked")
            if chosen[first]:
                block[row] = tokens[first]
            else:
                left.append(row)
            first += 1
        after.append((block, left))
    return after


def choose(proposals, passes):
    """Which proposals are fixed, as each sequence's strategy says.

    sequential
        The leftmost masked positions.
    low_confidence_static
        The most confident proposals.
    low_confidence_dynamic
        All proposals above the confidence threshold, but at least the `count` most confident.
    entropy_bounded
        Proposals by ascending entropy while its running sum stays within the bound, at least one; `count` does
        not matter. The published script takes the entropy from the chosen token's probability alone; this is
        the entropy of the whole distribution.

    Parameters
    ----------
    proposals : Proposals
    passes : sequence of SequencePass
        Whose masked rows they are for, one after the other.

    Returns
    -------
    bool [rows]

    Raises
    ------
    ValueError
        There are more or fewer proposals than masked rows.
    """
    cdef const float[::1] confidence = np.ascontiguousarray(proposals.confidence, np.float32)
    cdef const float[::1] entropy = np.ascontiguousarray(proposals.entropy, np.float32)
    cdef Py_ssize_t all_rows = confidence.shape[0], first = 0, rows, count
    if entropy.shape[0] != all_rows or sum([len(one.masked) for one in passes]) != all_rows:
        raise ValueError("there must be a proposal for each masked row")
    chosen = np.empty(all_rows, np.bool_)
    cdef unsigned char[::1] out = chosen.view(np.uint8)
    for one in passes:
        rows, options, name = len(one.masked), one.options, one.options.remasking
        if rows == 0:
            continue
        count = rows if one.count is None else min(one.count, rows)
        if one.count is None:  # the last pass that is left
            out[first : first + rows] = 1
        elif name == "sequential":
            out[first : first + rows] = 0
            out[first : first + count] = 1
        elif name == "low_confidence_static":
            highest(&confidence[first], rows, count, &out[first])
        elif name == "low_confidence_dynamic":
            if above(&confidence[first], rows, options.confidence_threshold, &out[first]) < count:
                highest(&confidence[first], rows, count, &out[first])
        elif name == "entropy_bounded":
            within(&entropy[first], rows, options.eb_threshold, &out[first])
        else:
            raise ValueError(f"no remasking strategy {name!r}")
        first += rows
    return chosen


cdef void highest(const float *values, Py_ssize_t rows, Py_ssize_t count, unsigned char *out) noexcept nogil:
    """The `count` highest values, of equal ones the earlier."""
    cdef Py_ssize_t i, best
    for i in range(rows):
        out[i] = 0
    for _ in range(count):
        best = -1
        for i in range(rows):
            if not out[i] and (best < 0 or values[i] > values[best]):
                best = i
        out[best] = 1


cdef Py_ssize_t above(const float *values, Py_ssize_t rows, float threshold, unsigned char *out) noexcept nogil:
    """All values above the threshold; returns how many."""
    cdef Py_ssize_t i, found = 0
    for i in range(rows):
        out[i] = values[i] > threshold
        found += out[i]
    return found


cdef void within(const float *values, Py_ssize_t rows, float bound, unsigned char *out) noexcept nogil:
    """Values from the lowest on, of equal ones the earlier, while their sum is within the bound; at least one."""
    cdef Py_ssize_t i, best
    cdef float total = 0
    for i in range(rows):
        out[i] = 0
    for taken in range(rows):
        best = -1
        for i in range(rows):
            if not out[i] and (best < 0 or values[i] < values[best]):
                best = i
        total += values[best]
        if taken and total > bound:
            return
        out[best] = 1

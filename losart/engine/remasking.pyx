"""Which proposals a pass fixes: remasking (SDAR, arXiv 2510.06303, and its published script)."""

import numpy as np

from libc.stdint cimport int64_t

from losart.engine.sampling import LEFT_OPEN


def remask(proposals, passes):
    """The blocks after a pass: the proposals that `choose` takes are in their places.

    Parameters
    ----------
    proposals : Proposals
    passes : sequence of SequencePass
        Whose they are, one after the other; their ids, masked and known rows are lists.

    Returns
    -------
    list of tuple
        Of each: the block, and where it is still masked; where fixed tokens may be changed then None, and the rows
        that were; of a pass that proposes the token after the block that token.

    Raises
    ------
    ValueError
        There are more or fewer proposals than rows that they are for.
    """
    cdef const unsigned char[::1] chosen = choose(proposals, passes).view(np.uint8)
    cdef const int64_t[::1] tokens = np.ascontiguousarray(proposals.tokens, np.int64)
    cdef Py_ssize_t first = 0, row
    cdef list block, masked, left, after = []
    if tokens.shape[0] != chosen.shape[0]:
        raise ValueError("there must be a proposal for each row")
    for one in passes:
        block, masked, left = list(one.ids), one.masked, []
        if one.known or not masked:  # few passes do these
            edited = []
            for row in sorted([*masked, *one.known]):
                if not chosen[first]:
                    left += [row] if row in masked else []
                else:
                    edited += [row] if row not in masked else []
                    block[row] = tokens[first]
                first += 1
            if one.known:
                after.append((block, left, None, edited))
            else:
                after.append((block, left, tokens[first]))
                first += 1
            continue
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

    Tokens that are known already are changed where another is proposed with a probability above the editing
    threshold. What `proposals.decided` says goes before all that.

    Parameters
    ----------
    proposals : Proposals
    passes : sequence of SequencePass
        Whose they are, one after the other.

    Returns
    -------
    bool [rows]

    Raises
    ------
    ValueError
        There are more or fewer proposals than rows that they are for.
    """
    cdef const float[::1] confidence = np.ascontiguousarray(proposals.confidence, np.float32)
    cdef const float[::1] entropy = np.ascontiguousarray(proposals.entropy, np.float32)
    cdef Py_ssize_t all_rows = confidence.shape[0], first = 0, rows
    if entropy.shape[0] != all_rows or sum([len(one.proposed) for one in passes]) != all_rows:
        raise ValueError("there must be a proposal for each row")
    chosen = np.empty(all_rows, np.bool_)
    cdef unsigned char[::1] out = chosen.view(np.uint8)
    for one in passes:
        rows = len(one.proposed)
        if rows == 0:
            continue
        if one.known:
            some = np.arange(first, first + rows)
            at = np.sort([*one.masked, *one.known])
            masked, sure = np.isin(at, one.masked), proposals.confidence[some] > one.options.editing_threshold
            edited = ~masked & sure & (proposals.tokens[some] != np.asarray(one.ids)[at])
            edited[masked] = of_masked(
                np.asarray(confidence)[some[masked]], np.asarray(entropy)[some[masked]], one
            )
            chosen[some] = edited
        elif not one.masked:  # the token after the block
            out[first] = 1
        else:
            fix(&confidence[first], &entropy[first], rows, one, &out[first])
        first += rows
    if proposals.decided is not None:
        chosen = np.where(proposals.decided == LEFT_OPEN, chosen, proposals.decided == 1)
    return chosen


def of_masked(const float[::1] confidence, const float[::1] entropy, one):
    """Which proposals for a sequence's masked rows are fixed: bool [rows]."""
    chosen = np.zeros(confidence.shape[0], np.bool_)
    cdef unsigned char[::1] out = chosen.view(np.uint8)
    if confidence.shape[0]:
        fix(&confidence[0], &entropy[0], confidence.shape[0], one, &out[0])
    return chosen


cdef int fix(
    const float *confidence, const float *entropy, Py_ssize_t rows, one, unsigned char *out
) except -1:
    options, name = one.options, one.options.remasking
    cdef Py_ssize_t i, count = rows if one.count is None else min(one.count, rows)
    cdef bint reaches = options.reaches_threshold
    if one.count is None:  # the last pass that is left
        for i in range(rows):
            out[i] = 1
    elif name == "sequential":
        for i in range(rows):
            out[i] = i < count
    elif name == "low_confidence_static":
        highest(confidence, rows, count, out)
    elif name == "low_confidence_dynamic":
        if above(confidence, rows, options.confidence_threshold, reaches, out) < count:
            highest(confidence, rows, count, out)
    elif name == "entropy_bounded":
        within(entropy, rows, options.eb_threshold, out)
    else:
        raise ValueError(f"no remasking strategy {name!r}")
    return 0


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


cdef Py_ssize_t above(
    const float *values, Py_ssize_t rows, float threshold, bint reaches, unsigned char *out
) noexcept nogil:
    """All values above the threshold, or with `reaches` equal to it; returns how many."""
    cdef Py_ssize_t i, found = 0
    for i in range(rows):
        out[i] = values[i] > threshold or (reaches and values[i] == threshold)
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

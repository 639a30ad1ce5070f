"""Which tokens of a block are active in a pass (LoSA, arXiv 2604.12056, section 3)."""

import numpy as np

from libc.stdint cimport int32_t


def query_change(const float[:, :, ::1] q, const float[:, :, ::1] previous, bint relative=False):
    """Mean squared change of each token's query.

    Parameters
    ----------
    q, previous : float32 [tokens, heads, head_dim]
    relative : bool
        Over the mean square of the previous query; of a query of zeros the change is infinite, or NaN.

    Returns
    -------
    float32 [tokens]
    """
    cdef Py_ssize_t tokens = q.shape[0], width = q.shape[1] * q.shape[2], t, i
    cdef double total, size, difference
    if previous.shape[0] != tokens or previous.shape[1] * previous.shape[2] != width:
        raise ValueError("q and previous must have the same shape")
    change = np.zeros(tokens, np.float32)
    cdef float[::1] out = change
    cdef const float *a
    cdef const float *b
    if tokens == 0 or width == 0:
        return change
    with nogil:
        for t in range(tokens):
            a = &q[t, 0, 0]
            b = &previous[t, 0, 0]
            total = size = 0.0
            for i in range(width):
                difference = <double>a[i] - b[i]
                total = total + difference * difference
                size = size + <double>b[i] * b[i]
            out[t] = <float>(total / (size if relative else width))
    return change


def select_active(const float[::1] change, Py_ssize_t count, float threshold=-1.0):
    """The tokens of largest change; of equal ones, the earlier.

    Parameters
    ----------
    change : float32 [tokens]
    count : int
        How many at most, 0 to tokens.
    threshold : float
        Only of those whose change is above it, or NaN.

    Returns
    -------
    int32 [any]
        Ascending token indices within the block.
    """
    cdef Py_ssize_t tokens = change.shape[0], t, other, rank, filled = 0
    if not 0 <= count <= tokens:
        raise ValueError(f"count must be 0 to {tokens}, not {count}")
    active = np.empty(count, np.int32)
    cdef int32_t[::1] out = active
    with nogil:
        for t in range(tokens):
            rank = 0
            for other in range(tokens):
                if change[other] > change[t] or (change[other] == change[t] and other < t):
                    rank = rank + 1
            if rank < count and filled < count and not change[t] <= threshold:
                out[filled] = <int32_t>t
                filled = filled + 1
    # A NaN ranks first, so that it is active; the logits are checked for it later.
    return active[:filled]

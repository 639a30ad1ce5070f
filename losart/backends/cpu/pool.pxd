ctypedef void (*Item)(void *state, Py_ssize_t item) noexcept nogil

# Runs items 0 .. count - 1 of a region, in any order: by all threads, or where there are other regions by the caller's.
# Without `share` by the caller's alone: a region pays from about 20 us on.
cdef void parallel_for(Item item, void *state, Py_ssize_t count, bint share) noexcept nogil


cdef inline Py_ssize_t last_at_most(const Py_ssize_t *ascending, Py_ssize_t count, Py_ssize_t value) noexcept nogil:
    # The last index whose entry is not above a value: of parts' first items, the part that an item is of.
    cdef Py_ssize_t low = 0, middle
    while count - low > 1:
        middle = (low + count) // 2
        if ascending[middle] <= value:
            low = middle
        else:
            count = middle
    return low

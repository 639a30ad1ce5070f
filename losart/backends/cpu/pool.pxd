ctypedef void (*Item)(void *state, Py_ssize_t item) noexcept nogil

# Runs items 0 .. count - 1 of a region, in any order: by all threads, or where there are other regions by the caller's.
# Without `share` by the caller's alone: a region pays from about 20 us on.
cdef void parallel_for(Item item, void *state, Py_ssize_t count, bint share) noexcept nogil

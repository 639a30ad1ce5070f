"""The threads that the CPU's kernels share: see pool.h."""

import os

cdef extern from "pool.h" nogil:
    void pool_set_threads(int threads)
    int pool_threads()
    void pool_run(Item run, void *state, Py_ssize_t count, int share)


cdef void parallel_for(Item item, void *state, Py_ssize_t count, bint share) noexcept nogil:
    pool_run(item, state, count, share)


def threads_in_use():
    """Threads that the kernels may run on."""
    return pool_threads()


def wanted_threads():
    """The first number of OMP_NUM_THREADS, as programs set it for their libraries, else the cores at hand."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first):
        return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


pool_set_threads(min(wanted_threads(), 1 << 16))

from libc.stdint cimport int32_t, uint64_t


cdef struct SlabSource:
    # Where a list of slabs of one layer and kv head lies; slab: see backends/simd.h.
    const uint64_t *chunks      # address of each chunk
    Py_ssize_t slabs_per_chunk
    Py_ssize_t slab_bytes
    Py_ssize_t key_offset       # bytes from a chunk's start to this layer's and head's first key slab
    Py_ssize_t value_offset
    const int32_t *pages        # page ids in the order to be read, or NULL: all, in order
    Py_ssize_t slabs_per_page
    int width                   # FLOAT32, BFLOAT16 or FLOAT16


cdef enum:
    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


cdef class PageTable:
    cdef readonly Py_ssize_t layers, kv_heads, head_dim, page_size, positions_per_chunk
    cdef readonly object kv_format
    cdef int width
    cdef Py_ssize_t chunk_count
    cdef object arrays
    cdef object kv_addresses
    cdef object bound_addresses
    cdef uint64_t[::1] kv_chunks
    cdef uint64_t[::1] bound_chunks
    cdef SlabSource source(self, Py_ssize_t layer, Py_ssize_t head, const int32_t *pages) noexcept nogil
    cdef const float *bound_group(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t group) noexcept nogil
    cdef void write_key_value(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t position,
                              const float *key, const float *value) noexcept nogil

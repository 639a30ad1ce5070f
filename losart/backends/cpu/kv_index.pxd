from libc.stdint cimport int32_t, uint16_t, uint64_t

from losart.backends.cpu.simd cimport narrow_bfloat16, narrow_float16, widen_bfloat16, widen_float16


cdef struct SlabSource:
    # Where a list of slabs of one layer and kv head lies; slab: see backends/simd.h.
    const uint64_t *chunks      # address of each chunk
    Py_ssize_t slabs_per_chunk
    Py_ssize_t slab_bytes
    Py_ssize_t key_offset       # bytes from a chunk's start to this layer's and head's first key slab
    Py_ssize_t value_offset
    const int32_t *pages        # page ids in the order to be read, or NULL: all, in order
    Py_ssize_t slabs_per_page
    int width                   # FLOAT32, ...


cdef struct PageBounds:
    # Of a group of 16 pages.
    float *exact                # [2 (largest, smallest), head_dim, 16]
    float *base                 # [head_dim]
    float *step
    uint64_t *codes             # [2, head_dim]


cdef enum:
    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3
    FLOAT8 = 4


cdef inline uint16_t narrow_to(float x, int width) noexcept nogil:
    return narrow_bfloat16(x) if width == BFLOAT16 else narrow_float16(x)


cdef inline float widened(uint16_t bits, int width) noexcept nogil:
    cdef float x
    if width == BFLOAT16:
        widen_bfloat16(&bits, &x, 1)
    else:
        widen_float16(&bits, &x, 1)
    return x


cdef inline float as_held(float x, int width) noexcept nogil:
    return x if width == FLOAT32 else widened(narrow_to(x, width), width)


cdef class PageTable:
    cdef readonly Py_ssize_t layers, kv_heads, head_dim, page_size, positions_per_chunk
    cdef readonly object kv_format
    cdef Py_ssize_t slab_bytes
    cdef int width
    cdef int bounds_width
    cdef Py_ssize_t chunk_count
    cdef object arrays
    cdef object kv_addresses
    cdef object bound_addresses
    cdef uint64_t[::1] kv_chunks
    cdef uint64_t[::1] bound_chunks
    cdef SlabSource source(self, Py_ssize_t layer, Py_ssize_t head, const int32_t *pages) noexcept nogil
    cdef PageBounds bounds(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t group) noexcept nogil
    cdef Py_ssize_t full_groups(self, Py_ssize_t positions) noexcept nogil
    cdef void code_bounds(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t group) noexcept nogil
    cdef void write_key_value(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t position,
                              const float *key, const float *value) noexcept nogil

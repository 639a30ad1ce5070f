"""Products of activations with a weight matrix, every weight read once for a block's.

Not BLAS, because NumPy's brings its own threads: they go on spinning after each matmul, on the cores that the attention
kernels' OpenMP threads want next. It also reads 16-bit weights as they are, and is no faster.

Up to FEW tokens each have a sum for a row of weights, whose inputs are the lanes (row_products, simd.h).
More are the lanes themselves, sixteen of them: the activations are laid out [in, 16] for slab_scores, as
if they were a slab of keys, and rows of weights take the place of queries; a token's sums do not depend on how many
there are. The matmul must read N * K weights; all tokens, or MOST of them, share each.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport uint16_t
from libc.stdlib cimport free, malloc

from losart.backends.cpu.kv_index cimport BFLOAT16, FLOAT32
from losart.backends.cpu.simd cimport (
    row_products, row_products_bfloat16, slab_scores, widen_bfloat16, widen_float16
)

cdef enum:
    LANES = 16
    ROWS = 6             # weights' rows that slab_scores takes at a time
    PANEL = 48           # weights' rows of a work item
    FEW = 8              # tokens that row_products takes
    MOST = 64            # tokens at a time: their slabs stay in the second cache while rows of weights pass
    WORTH_THREADS = 1 << 20   # multiply-adds

FEW_TOKENS = FEW

cdef int multiply_slabs(const char *weight, int width, Py_ssize_t rows, Py_ssize_t inner, const float *slabs,
                        Py_ssize_t tokens, float *out, Py_ssize_t out_stride) noexcept nogil:
    # weight [rows, inner] times slabs [ceil(tokens / 16), inner, 16]: out [tokens, rows].
    cdef Py_ssize_t row = 0, count, slab, t, r, itemsize = 4 if width == FLOAT32 else 2
    cdef const char *source
    cdef const float *wide
    cdef float sums[ROWS * LANES]
    cdef float *scratch = NULL
    if width != FLOAT32:
        scratch = <float *>malloc(sizeof(float) * ROWS * inner)
        if scratch == NULL:
            return 1
    while row < rows:
        count = min(ROWS, rows - row)
        source = weight + row * inner * itemsize
        if width == FLOAT32:
            wide = <const float *>source
        else:
            wide = scratch
            if width == BFLOAT16:
                widen_bfloat16(<const uint16_t *>source, scratch, count * inner)
            else:
                widen_float16(<const uint16_t *>source, scratch, count * inner)
        for slab in range((tokens + LANES - 1) // LANES):
            slab_scores(wide, count, inner, slabs + slab * inner * LANES, sums, LANES)
            for t in range(min(LANES, tokens - slab * LANES)):
                for r in range(count):
                    out[(slab * LANES + t) * out_stride + row + r] = sums[r * LANES + t]
        row += count
    free(scratch)
    return 0


cdef int multiply_few(const char *weight, int width, Py_ssize_t rows, Py_ssize_t inner, const float *x,
                      Py_ssize_t tokens, float *out, Py_ssize_t out_stride) noexcept nogil:
    # As multiply_slabs, of x [tokens, inner] with FEW tokens at most.
    cdef Py_ssize_t row
    cdef float *scratch
    if width == FLOAT32:
        row_products(<const float *>weight, rows, inner, x, tokens, out, out_stride)
    elif width == BFLOAT16:
        row_products_bfloat16(<const uint16_t *>weight, rows, inner, x, tokens, out, out_stride)
    else:
        scratch = <float *>malloc(sizeof(float) * inner)
        if scratch == NULL:
            return 1
        for row in range(rows):
            widen_float16(<const uint16_t *>weight + row * inner, scratch, inner)
            row_products(scratch, 1, inner, x, tokens, out + row, out_stride)
        free(scratch)
    return 0


cdef int multiply_panel(const char *weight, int width, Py_ssize_t rows, Py_ssize_t inner, const float *x,
                        Py_ssize_t tokens, float *out, Py_ssize_t out_stride) noexcept nogil:
    # weight [rows, inner] times x, as it was prepared.
    cdef Py_ssize_t some, first, failed = 0
    if tokens <= FEW:
        return multiply_few(weight, width, rows, inner, x, tokens, out, out_stride)
    for some in range((tokens + MOST - 1) // MOST):
        first = some * MOST
        failed += multiply_slabs(weight, width, rows, inner, x + first * inner, min(MOST, tokens - first),
                                 out + first * out_stride, out_stride)
    return failed


def prepared(x):
    """Activations [tokens, in] as `multiply` takes them.

    FEW tokens as they are, more as slabs [ceil(tokens / 16), in, 16], padded with zeros.
    """
    tokens, inner = x.shape
    if tokens <= FEW:
        return np.ascontiguousarray(x)[None]
    padded = np.zeros((-(-tokens // LANES) * LANES, inner), np.float32)
    padded[:tokens] = x
    return np.ascontiguousarray(padded.reshape(-1, LANES, inner).transpose(0, 2, 1))


def multiply(const float[:, :, ::1] x, weight, int width, float[:, ::1] out, Py_ssize_t column):
    """Product of activations and a weight matrix.

    Parameters
    ----------
    x : float32
        From `prepared`.
    weight : float32, float16, or uint16 (the bits of bfloat16) [rows, in]
    width : int
        `Format.code` of the weight.
    out : float32 [tokens, any]
        Columns column, ..., column + rows - 1 are written.
    column : int
    """
    cdef Py_ssize_t rows = weight.shape[0], inner = weight.shape[1], tokens = out.shape[0], item, failed = 0
    cdef Py_ssize_t itemsize = weight.dtype.itemsize
    cdef bint few = tokens <= FEW
    if few:
        fits = x.shape[0] == 1 and x.shape[1] == tokens and x.shape[2] == inner
    else:
        fits = x.shape[0] == (tokens + LANES - 1) // LANES and x.shape[1] == inner
    if not fits:
        raise ValueError(f"activations for {inner} inputs and {tokens} tokens were expected")
    if column < 0 or column + rows > out.shape[1] or not weight.flags.c_contiguous:
        raise ValueError("the outputs do not fit into out, or the weight is not contiguous")
    if rows == 0 or tokens == 0:
        return
    cdef const unsigned char[::1] weight_bytes = weight.reshape(-1).view(np.uint8)
    cdef const char *source = <const char *>&weight_bytes[0]
    cdef Py_ssize_t items = (rows + PANEL - 1) // PANEL
    cdef bint threads = rows * inner * (tokens if few else LANES * x.shape[0]) > WORTH_THREADS
    for item in prange(items, nogil=True, schedule="static", use_threads_if=threads):
        failed += multiply_panel(source + item * PANEL * inner * itemsize, width, min(PANEL, rows - item * PANEL),
                                 inner, &x[0, 0, 0], tokens, &out[0, column + item * PANEL], out.shape[1])
    if failed:
        raise MemoryError

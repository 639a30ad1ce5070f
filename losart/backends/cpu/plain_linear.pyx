"""Products of activations with a weight matrix, every weight read once for a block's.

Not BLAS, because NumPy's brings its own threads: they go on spinning after each matmul, on the cores that the attention
kernels' OpenMP threads want next. It also reads 16-bit weights as they are, and is no faster.

Up to FEW tokens each have a sum for a row of weights, whose inputs are the lanes (row_products, simd.h).
More are the lanes themselves, sixteen of them: the activations are laid out [in, 16] for slab_products; a token's
sums do not depend on how many there are. The matmul must read N * K weights; all tokens, or MOST of them, share each.
"""

import numpy as np

from cython.parallel cimport prange
from losart.backends.cpu.kv_index cimport FLOAT32
from losart.backends.cpu.simd cimport row_products, slab_products

cdef enum:
    LANES = 16
    ROWS = 6             # weights' rows that slab_products takes at a time
    PANEL = 48           # weights' rows of a work item
    FEW = 8              # tokens that row_products takes
    MOST = 64            # tokens at a time: their slabs stay in the second cache while rows of weights pass
    WORTH_THREADS = 1 << 20   # multiply-adds

FEW_TOKENS = FEW

cdef void multiply_slabs(const char *weight, int width, Py_ssize_t rows, Py_ssize_t inner, const float *slabs,
                         Py_ssize_t tokens, float *out, Py_ssize_t out_stride) noexcept nogil:
    # weight [rows, inner] times slabs [ceil(tokens / 16), inner, 16]: out [tokens, rows].
    cdef Py_ssize_t row = 0, count, slab, t, r, row_bytes = inner * (4 if width == FLOAT32 else 2)
    cdef float sums[ROWS * LANES]
    while row < rows:
        if rows >= ROWS:
            row = min(row, rows - ROWS)  # the last may repeat some
        count = min(ROWS, rows - row)
        for slab in range((tokens + LANES - 1) // LANES):
            slab_products(weight + row * row_bytes, width, count, inner, slabs + slab * inner * LANES, sums)
            for t in range(min(LANES, tokens - slab * LANES)):
                for r in range(count):
                    out[(slab * LANES + t) * out_stride + row + r] = sums[r * LANES + t]
        row += count


cdef void multiply_panel(const char *weight, int width, Py_ssize_t rows, Py_ssize_t inner, const float *x,
                         Py_ssize_t tokens, float *out, Py_ssize_t out_stride) noexcept nogil:
    # weight [rows, inner] times x, as it was prepared.
    cdef Py_ssize_t some, first
    if tokens <= FEW:
        row_products(weight, width, rows, inner, x, tokens, out, out_stride)
        return
    for some in range((tokens + MOST - 1) // MOST):
        first = some * MOST
        multiply_slabs(weight, width, rows, inner, x + first * inner, min(MOST, tokens - first),
                       out + first * out_stride, out_stride)


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
    cdef Py_ssize_t rows = weight.shape[0], inner = weight.shape[1], tokens = out.shape[0], item
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
        multiply_panel(source + item * PANEL * inner * itemsize, width, min(PANEL, rows - item * PANEL), inner,
                       &x[0, 0, 0], tokens, &out[0, column + item * PANEL], out.shape[1])

"""Products of activations with a weight matrix, every weight read once for a block's.

Not BLAS, because NumPy's brings its own threads: they go on spinning after each matmul, on the cores that the other
kernels' threads want next. It also reads 16-bit weights as they are, and is no faster.

Up to FEW tokens each have a sum for a row of weights, whose inputs are the lanes (row_products, simd.h).
More are the lanes themselves, sixteen of them: the activations are laid out [in, 16] for slab_products; a token's
sums do not depend on how many there are. The matmul must read N * K weights; all tokens, or MOST of them, share each.
"""

import numpy as np

from losart.backends.cpu.kv_index cimport FLOAT32
from losart.backends.cpu.pool cimport parallel_for
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


cdef struct Product:
    const char *weight          # [rows, inner]
    int width
    Py_ssize_t rows, inner
    const float *x              # as it was prepared
    Py_ssize_t tokens
    float *out                  # [tokens, out_stride]
    Py_ssize_t out_stride


cdef void multiply_panel(void *state, Py_ssize_t item) noexcept nogil:
    cdef const Product *p = <const Product *>state
    cdef Py_ssize_t row = item * PANEL, rows = min(PANEL, p.rows - row), some, first
    cdef const char *weight = p.weight + row * p.inner * (4 if p.width == FLOAT32 else 2)
    if p.tokens <= FEW:
        row_products(weight, p.width, rows, p.inner, p.x, p.tokens, p.out + row, p.out_stride)
        return
    for some in range((p.tokens + MOST - 1) // MOST):
        first = some * MOST
        multiply_slabs(weight, p.width, rows, p.inner, p.x + first * p.inner, min(MOST, p.tokens - first),
                       p.out + first * p.out_stride + row, p.out_stride)


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
    cdef Py_ssize_t rows = weight.shape[0], inner = weight.shape[1], tokens = out.shape[0]
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
    cdef Product product = Product(<const char *>&weight_bytes[0], width, rows, inner, &x[0, 0, 0], tokens,
                                   &out[0, column], out.shape[1])
    with nogil:
        parallel_for(multiply_panel, &product, (rows + PANEL - 1) // PANEL,
                     rows * inner * (tokens if few else LANES * x.shape[0]) > WORTH_THREADS)

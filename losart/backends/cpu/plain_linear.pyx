"""Products of activations with a weight matrix, every weight read once for a block's.

Not BLAS, because NumPy's brings its own threads: they go on spinning after each matmul, on the cores that the other
kernels' threads want next. It also reads 16-bit weights as they are, and is no faster.

Up to FEW tokens each have a sum for a row of weights, whose inputs are the lanes (row_products, simd.h).
More are the lanes themselves, sixteen of them: the activations are laid out [in, 16] for slab_products; a token's
sums do not depend on how many there are. The matmul must read N * K weights; all tokens, or MOST of them, share each.
"""

import numpy as np

from losart.backends.cpu.kv_index cimport FLOAT32
from losart.backends.cpu.pool cimport last_at_most, parallel_for
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
    bint few
    const float *x              # as it was prepared
    Py_ssize_t tokens
    float *out                  # [tokens, out_stride]
    Py_ssize_t out_stride


cdef struct Products:
    const Product *each
    const Py_ssize_t *panels    # that there are before each
    Py_ssize_t count


cdef void multiply_panel(void *state, Py_ssize_t item) noexcept nogil:
    cdef const Products *products = <const Products *>state
    cdef Py_ssize_t index = last_at_most(products.panels, products.count, item)
    cdef const Product *p = products.each + index
    cdef Py_ssize_t row = (item - products.panels[index]) * PANEL, rows = min(PANEL, p.rows - row), first = 0, some
    cdef const char *weight = p.weight + row * p.inner * (4 if p.width == FLOAT32 else 2)
    cdef float *out
    while first < p.tokens:
        some = min(FEW if p.few else MOST, p.tokens - first)
        out = p.out + first * p.out_stride + row
        if p.few:
            row_products(weight, p.width, rows, p.inner, p.x + first * p.inner, some, out, p.out_stride)
        else:
            multiply_slabs(weight, p.width, rows, p.inner, p.x + first * p.inner, some, out, p.out_stride)
        first += some


def prepared(x, few=None):
    """Activations [tokens, in] as `multiply` takes them.

    Parameters
    ----------
    x : float32 [tokens, in]
    few : bool, optional
        Whether to sum them as FEW tokens are summed; None: if there are no more.

    Returns
    -------
    float32
        x as it is, or slabs [ceil(tokens / 16), in, 16], padded with zeros.
    """
    tokens, inner = x.shape
    if tokens <= FEW if few is None else few:
        return np.ascontiguousarray(x)
    padded = np.zeros((-(-tokens // LANES) * LANES, inner), np.float32)
    padded[:tokens] = x
    return np.ascontiguousarray(padded.reshape(-1, LANES, inner).transpose(0, 2, 1))


def multiply(products):
    """Products of activations and weight matrices, of any number, whose work all threads share.

    Parameters
    ----------
    products : sequence of tuples
        x : float32
            From `prepared`.
        weight : float32, float16, or uint16 (the bits of bfloat16) [rows, in]
        width : int
            `Format.code` of the weight.
        out : float32 [tokens, any]
            Columns column, ..., column + rows - 1 are written.
        column : int
    """
    cdef Py_ssize_t index = 0, rows, inner, tokens, column, work = 0
    cdef const float[:, ::1] few
    cdef const float[:, :, ::1] slabs
    cdef const unsigned char[::1] weight_bytes
    cdef float[:, ::1] to
    cdef unsigned char[::1] held = np.empty(len(products) * sizeof(Product) + 1, np.uint8)
    cdef Product *product = <Product *>&held[0]
    cdef Py_ssize_t[::1] panels = np.zeros(len(products) + 1, np.intp)
    for x, weight, width, out, column in products:
        to = out
        rows, inner, tokens = weight.shape[0], weight.shape[1], to.shape[0]
        if column < 0 or column + rows > to.shape[1] or not weight.flags.c_contiguous:
            raise ValueError("the outputs do not fit into out, or the weight is not contiguous")
        if x.ndim == 2:
            fits = x.shape == (tokens, inner)
        else:
            fits = x.shape == ((tokens + LANES - 1) // LANES, inner, LANES)
        if not fits:
            raise ValueError(f"activations for {inner} inputs and {tokens} tokens were expected")
        if rows == 0 or tokens == 0 or inner == 0:
            np.asarray(out)[:, column : column + rows] = 0
            continue
        weight_bytes = weight.reshape(-1).view(np.uint8)
        product[index] = Product(<const char *>&weight_bytes[0], width, rows, inner, x.ndim == 2, NULL, tokens,
                                 &to[0, column], to.shape[1])
        if x.ndim == 2:
            few = x
            product[index].x = &few[0, 0]
            work += rows * inner * tokens
        else:
            slabs = x
            product[index].x = &slabs[0, 0, 0]
            work += rows * inner * LANES * slabs.shape[0]
        panels[index + 1] = panels[index] + (rows + PANEL - 1) // PANEL
        index += 1
    cdef Products all_products = Products(product, &panels[0], index)
    with nogil:
        parallel_for(multiply_panel, &all_products, all_products.panels[index], work > WORTH_THREADS)

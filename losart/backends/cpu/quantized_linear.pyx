"""Products of activations with a quantized weight matrix, in integers.

Weights are packed in panels of 16 rows, and read once for up to TOKENS tokens. Activations are rounded with a scale
for each token and block of columns (integer_dots.h): for weights of 8 bits to 16, 2^-16 of the block's largest, for
those of 4 bits to 8 in blocks of 32 at most, which adds little to their own rounding. Each token's sums are the same whatever
other tokens there are. A matmul must read the codes, rows * in * bits / 8, and 4 bytes per scale.
"""

import numpy as np

from libc.math cimport INFINITY, NAN
from libc.stdint cimport int8_t, int16_t, uint8_t

from losart.backends.cpu.pool cimport last_at_most, parallel_for
from losart.backends.cpu.simd cimport largest_magnitude, round_int8, round_int16

cdef extern from "integer_dots.h" nogil:
    ctypedef struct Panel:
        const uint8_t *codes
        const float *scales
        const float *zeros
        long bits, blocks, columns, group_blocks, zero_step

    ctypedef struct Activations:
        const void *values
        const float *scales
        const float *sums
        long tokens

    void panel_product(Panel w, Activations x, float *y)
    int has_dots()

cdef enum:
    PANEL_ROWS = 16
    LARGEST_BLOCK = 64    # BLOCK of integer_dots.h
    NIBBLE_BLOCK = 32     # of weights of 4 bits
    SMALLEST_BLOCK = 8
    MOST_TOKENS = 64      # at a time
    WORTH_THREADS = 1 << 20   # multiply-adds

TOKENS = MOST_TOKENS
ROWS = PANEL_ROWS  # of a panel


class QuantizedMatrix:
    """Codes and scales of a matrix [rows, in], packed; (code - zero) * scale is an entry.

    Parameters
    ----------
    rows, columns : int
    bits : {4, 8}
    group : int
        Columns that share a scale, a multiple of 8; or all columns.
    zeros : bool
        Whether groups have zeros. Else it is 0, and of 4 bits, whose codes are held as 0 to 15, 8.

    Attributes
    ----------
    block : int
        Columns whose activations share a scale.
    activations : numpy.dtype
        What activations are rounded to.
    codes : uint8 [panels, bytes]
        As integer_dots.h has them, panels of 16 rows, all of whose columns follow one another.
    scales : float32 [panels, groups, 16]
    zeros : float32 [panels, groups or 1, 16]
    """

    def __init__(self, rows, columns, bits, group, zeros):
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        self.block = block_of(columns, group, bits)
        self.activations = np.dtype(np.int8 if bits == 4 else np.int16)
        if bits not in (4, 8) or self.block is None:
            raise ValueError(f"a matrix of {bits} bits cannot be packed in groups of {group}")
        self.blocks = -(-columns // self.block)
        panels, groups = -(-rows // ROWS), -(-columns // group)
        self.codes = np.zeros((panels, self.blocks * self.block * ROWS * bits // 8), np.uint8)
        self.scales = np.zeros((panels, groups, ROWS), np.float32)
        self.has_zeros = zeros
        self.zeros = np.full((panels, groups if zeros else 1, ROWS), 8 if bits == 4 else 0, np.float32)

    def __len__(self):
        return self.rows

    @property
    def nbytes(self):
        """Bytes that it takes."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def fill(self, start, codes, scales, zeros=None):
        """Pack some rows.

        Parameters
        ----------
        start : int
            The first row, a multiple of 16; all panels but the last are filled whole.
        codes : int [rows, in]
            Of 4 bits -8 to 7, of 8 -128 to 127.
        scales : float32 [rows, groups]
        zeros : int [rows, groups], optional
        """
        rows, columns = codes.shape
        if start % ROWS or columns != self.columns or start + rows > self.rows:
            raise ValueError(f"rows {start} to {start + rows} of {columns} columns do not fit")
        if rows % ROWS and start + rows != self.rows:
            raise ValueError("a panel must be filled whole")
        offset = 8 if self.bits == 4 else 0
        panels, first = -(-rows // ROWS), start // ROWS
        padded = np.zeros((panels * ROWS, self.blocks * self.block), np.int16)
        padded[:rows, :columns] = codes
        padded += offset
        if padded.min() < (0 if offset else -128) or padded.max() > (15 if offset else 127):
            raise ValueError(f"codes do not fit into {self.bits} bits")
        # [panel, row, pair or four of columns, column] to [panel, pair or four, row, column]
        together = 4 if self.bits == 4 else 2
        lanes = padded.astype(np.uint8).reshape(panels, ROWS, -1, together).transpose(0, 2, 1, 3)
        if self.bits == 4:
            lanes = lanes[:, ::2] | lanes[:, 1::2] << 4
        self.codes[first : first + panels] = lanes.reshape(panels, -1)

        def placed(values):
            of_rows = np.zeros((panels * ROWS, values.shape[1]), np.float32)
            of_rows[:rows] = values
            return of_rows.reshape(panels, ROWS, -1).transpose(0, 2, 1)

        self.scales[first : first + panels] = placed(scales)
        if self.has_zeros:
            self.zeros[first : first + panels] = placed(np.asarray(zeros) + offset)


def dots_in_use():
    """Whether products use instructions for dot products: VNNI, or Arm's."""
    return bool(has_dots())


def nbytes_of(rows, columns, bits, group, zeros):
    """Bytes that a `QuantizedMatrix` takes."""
    panels, groups, block = -(-rows // ROWS), -(-columns // group), block_of(columns, group, bits)
    codes = -(-columns // block) * block * ROWS * bits // 8
    return panels * (codes + 4 * ROWS * (groups + (groups if zeros else 1)))


def block_of(columns, group, bits):
    """Columns whose activations share a scale, where some share a weight's; None: there is no such block."""
    largest = NIBBLE_BLOCK if bits == 4 else LARGEST_BLOCK
    if group >= columns:
        return largest
    return next((n for n in (largest, 32, 16, SMALLEST_BLOCK) if group % n == 0), None)


def rounded(const float[:, ::1] x, Py_ssize_t block, dtype):
    """Activations as `multiply` takes them.

    Parameters
    ----------
    x : float32 [tokens, in]
    block : int
    dtype : {int8, int16}

    Returns
    -------
    values : dtype [blocks, tokens, block]
        Padded with zeros.
    scales, sums : float32 [blocks, tokens]
        Of the values; their sum, scaled. NaN where an activation is not finite.
    """
    cdef Py_ssize_t tokens = x.shape[0], inner = x.shape[1], blocks = (inner + block - 1) // block
    values = np.zeros((blocks, tokens, block), dtype)
    scales, sums = np.empty((blocks, tokens), np.float32), np.empty((blocks, tokens), np.float32)
    if tokens and inner:
        if values.itemsize == 1:
            round_all[int8_t](x, block, values, scales, sums)
        else:
            round_all[int16_t](x, block, values, scales, sums)
    return values, scales, sums


ctypedef fused integer:
    int8_t
    int16_t


cdef void round_all(const float[:, ::1] x, Py_ssize_t block, integer[:, :, ::1] to, float[:, ::1] scale,
                    float[:, ::1] total) noexcept nogil:
    cdef Py_ssize_t b, t
    for b in range(to.shape[0]):
        for t in range(x.shape[0]):
            round_block(&x[t, b * block], min(block, x.shape[1] - b * block), &to[b, t, 0], &scale[b, t], &total[b, t])


cdef void round_block(const float *x, Py_ssize_t count, integer *to, float *scale, float *total) noexcept nogil:
    cdef float largest = largest_magnitude(x, count), most = 127 if integer is int8_t else 32767, factor
    if not (largest < INFINITY):
        scale[0] = total[0] = NAN
        return
    scale[0] = largest / most
    factor = most / largest if scale[0] > 0 else INFINITY
    if not (factor < INFINITY):  # zeros, or so small that it cannot be divided by
        scale[0] = total[0] = 0
    elif integer is int8_t:
        total[0] = round_int8(x, count, factor, to) * scale[0]
    else:
        total[0] = round_int16(x, count, factor, to) * scale[0]


def multiply_all(products):
    """Products of activations and quantized matrices, of any number, whose work all threads share.

    Parameters
    ----------
    products : sequence of tuples
        x : float32 [tokens, in]
        matrix : QuantizedMatrix
        out : float32 [tokens, any]
            Columns column, ..., column + rows - 1 are written.
        column : int
    """
    parts, last = [], None
    for x, matrix, out, column in products:
        form = x, matrix.block, matrix.activations
        if last is None or form[0] is not last[0] or form[1:] != last[1:]:  # else of the same rows as before
            slices = [slice(first, first + MOST_TOKENS) for first in range(0, len(x), MOST_TOKENS)]
            rows, last = [(some, rounded(x[some], matrix.block, matrix.activations)) for some in slices], form
        parts += [(of_rows, matrix, out[some], column) for some, of_rows in rows]
    multiply(parts)


def multiply(products):
    """`multiply_all` of TOKENS at most, as `rounded` gives them by the matrix's block and activations."""
    cdef Py_ssize_t index = 0, column, rows, block, blocks, tokens, group_blocks, work = 0
    cdef const uint8_t[:, :, ::1] values
    cdef const float[:, ::1] x_scales, x_sums
    cdef const uint8_t[:, ::1] codes
    cdef const float[:, :, ::1] scales, zeros
    cdef float[:, ::1] to
    cdef unsigned char[::1] held = np.empty(len(products) * sizeof(Product) + 1, np.uint8)
    cdef Product *product = <Product *>&held[0]
    cdef Py_ssize_t[::1] panels = np.zeros(len(products) + 1, np.intp)
    for x, matrix, out, column in products:
        if x[0].dtype != matrix.activations:
            raise ValueError(f"activations of {matrix.activations} were expected")
        to, values, x_scales, x_sums = out, x[0].view(np.uint8), x[1], x[2]
        codes, scales, zeros = matrix.codes, matrix.scales, matrix.zeros
        rows, block, blocks, tokens = matrix.rows, matrix.block, matrix.blocks, to.shape[0]
        if (values.shape[0] != blocks or values.shape[1] != tokens or x[0].shape[2] != block
                or tokens > MOST_TOKENS):
            raise ValueError(f"activations of {blocks} blocks of {block} and {tokens} tokens were expected")
        if column < 0 or column + rows > to.shape[1]:
            raise ValueError("the outputs do not fit into out")
        if rows == 0 or tokens == 0 or blocks == 0:
            np.asarray(out)[:, column : column + rows] = 0
            continue
        group_blocks = matrix.group // block if matrix.group < matrix.columns else blocks
        product[index] = Product(
            Panel(&codes[0, 0], &scales[0, 0, 0], &zeros[0, 0, 0], matrix.bits, blocks, block, group_blocks,
                  PANEL_ROWS if zeros.shape[1] > 1 else 0),
            codes.shape[1], scales.shape[1] * PANEL_ROWS, zeros.shape[1] * PANEL_ROWS, rows,
            Activations(&values[0, 0, 0], &x_scales[0, 0], &x_sums[0, 0], tokens), &to[0, column], to.shape[1])
        panels[index + 1] = panels[index] + codes.shape[0]
        work += rows * blocks * block * tokens
        index += 1
    cdef Products all_products = Products(product, &panels[0], index)
    with nogil:
        parallel_for(multiply_panel, &all_products, all_products.panels[index], work > WORTH_THREADS)


cdef struct Product:
    Panel first
    Py_ssize_t codes, scales, zeros   # from one panel to the next
    Py_ssize_t rows
    Activations x
    float *out                        # [tokens, out_stride]
    Py_ssize_t out_stride


cdef struct Products:
    const Product *each
    const Py_ssize_t *panels          # that there are before each
    Py_ssize_t count


cdef void multiply_panel(void *state, Py_ssize_t item) noexcept nogil:
    cdef const Products *products = <const Products *>state
    cdef Py_ssize_t index = last_at_most(products.panels, products.count, item)
    cdef const Product *p = products.each + index
    cdef float y[MOST_TOKENS * PANEL_ROWS]
    cdef Panel panel = p.first
    cdef Py_ssize_t at = item - products.panels[index], row = at * PANEL_ROWS, t, r
    panel.codes += at * p.codes
    panel.scales += at * p.scales
    panel.zeros += at * p.zeros
    panel_product(panel, p.x, y)
    for t in range(p.x.tokens):
        for r in range(min(PANEL_ROWS, p.rows - row)):
            p.out[t * p.out_stride + row + r] = y[t * PANEL_ROWS + r]

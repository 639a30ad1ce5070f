"""Products of activations with a quantized weight matrix, in integers.

Weights are packed in panels of 16 rows, and read once for up to TOKENS tokens. Activations are rounded to 16 bits with a
scale for each token and block of columns (integer_dots.h): to 2^-16 of the block's largest. Each token's sums are the
same whatever other tokens there are. A matmul must read the codes, rows * in * bits / 8, and 4 bytes per scale.
"""

import numpy as np

from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, fabsf, lrintf
from libc.stdint cimport int16_t, uint8_t, uintptr_t
from libc.string cimport memset

cdef extern from "integer_dots.h" nogil:
    void unpack_block(const uint8_t *codes, long columns, int bits, int16_t *w)
    void add_block(const int16_t *w, long columns, const float *scale, const float *zero, const int16_t *x,
                   const float *x_scale, const float *x_sum, long tokens, float *sums)

cdef enum:
    PANEL_ROWS = 16
    LARGEST_BLOCK = 64    # columns: sums of 2^15 * 2^7 * 64 fit into 32 bits
    SMALLEST_BLOCK = 8
    MOST_TOKENS = 64      # at a time
    CACHE_LINE = 64       # bytes: vectors that lie in two of them take longer
    WORTH_THREADS = 1 << 20   # multiply-adds
    LARGEST = 32767

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
    codes : uint8 [panels, bytes]
        As `unpack_block` takes them, panels of 16 rows, all of whose columns follow one another.
    scales : float32 [panels, groups, 16]
    zeros : float32 [panels, groups or 1, 16]
    """

    def __init__(self, rows, columns, bits, group, zeros):
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        self.block = block_of(columns, group)
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
        # [panel, row, pair of columns, column] to [panel, pair, row, column]
        pairs = padded.astype(np.uint8).reshape(panels, ROWS, -1, 2).transpose(0, 2, 1, 3)
        if self.bits == 4:
            pairs = pairs[:, ::2] | pairs[:, 1::2] << 4
        self.codes[first : first + panels] = pairs.reshape(panels, -1)

        def placed(values):
            of_rows = np.zeros((panels * ROWS, values.shape[1]), np.float32)
            of_rows[:rows] = values
            return of_rows.reshape(panels, ROWS, -1).transpose(0, 2, 1)

        self.scales[first : first + panels] = placed(scales)
        if self.has_zeros:
            self.zeros[first : first + panels] = placed(np.asarray(zeros) + offset)


def nbytes_of(rows, columns, bits, group, zeros):
    """Bytes that a `QuantizedMatrix` takes."""
    panels, groups, block = -(-rows // ROWS), -(-columns // group), block_of(columns, group)
    codes = -(-columns // block) * block * ROWS * bits // 8
    return panels * (codes + 4 * ROWS * (groups + (groups if zeros else 1)))


def block_of(columns, group):
    """Columns whose activations share a scale, where some share a weight's; None: there is no such block."""
    if group >= columns:
        return LARGEST_BLOCK
    return next((n for n in (LARGEST_BLOCK, 32, 16, SMALLEST_BLOCK) if group % n == 0), None)


def rounded(const float[:, ::1] x, Py_ssize_t block):
    """Activations as `multiply` takes them.

    Parameters
    ----------
    x : float32 [tokens, in]
    block : int

    Returns
    -------
    values : int16 [blocks, tokens, block]
        Padded with zeros.
    scales, sums : float32 [blocks, tokens]
        Of the values; their sum, scaled. NaN where an activation is not finite.
    """
    cdef Py_ssize_t tokens = x.shape[0], inner = x.shape[1], blocks = (inner + block - 1) // block, b, t
    values = np.zeros((blocks, tokens, block), np.int16)
    scales, sums = np.empty((blocks, tokens), np.float32), np.empty((blocks, tokens), np.float32)
    cdef int16_t[:, :, ::1] to = values
    cdef float[:, ::1] scale = scales, total = sums
    if tokens and inner:
        for b in range(blocks):
            for t in range(tokens):
                round_block(&x[t, b * block], min(block, inner - b * block), &to[b, t, 0], &scale[b, t], &total[b, t])
    return values, scales, sums


cdef void round_block(const float *x, Py_ssize_t count, int16_t *to, float *scale, float *total) noexcept nogil:
    cdef Py_ssize_t i
    cdef float largest = 0, factor
    cdef long whole = 0
    for i in range(count):
        largest = max(largest, fabsf(x[i]))
    for i in range(count):
        if not (fabsf(x[i]) < INFINITY):
            largest = INFINITY
    if not (largest < INFINITY):
        scale[0] = total[0] = NAN
        return
    scale[0] = largest / LARGEST
    if scale[0] == 0:  # or so small that it cannot be divided by
        total[0] = 0
        return
    factor = LARGEST / largest
    if not (factor < INFINITY):
        scale[0] = total[0] = 0
        return
    for i in range(count):
        to[i] = <int16_t>lrintf(x[i] * factor)
        whole += to[i]
    total[0] = whole * scale[0]


def multiply_all(const float[:, ::1] x, matrix, float[:, ::1] out, Py_ssize_t column):
    """`multiply` of any number of tokens, x [tokens, in], some at a time."""
    cdef Py_ssize_t first
    for first in range(0, x.shape[0], MOST_TOKENS):
        some = slice(first, first + MOST_TOKENS)
        multiply(rounded(np.asarray(x)[some], matrix.block), matrix, np.asarray(out)[some], column)


def multiply(x, matrix, float[:, ::1] out, Py_ssize_t column):
    """Product of activations and a quantized matrix.

    Parameters
    ----------
    x : tuple
        From `rounded`, by the matrix's block, of TOKENS tokens at most.
    matrix : QuantizedMatrix
    out : float32 [tokens, any]
        Columns column, ..., column + rows - 1 are written.
    column : int
    """
    cdef const int16_t[:, :, ::1] values = x[0]
    cdef const float[:, ::1] x_scales = x[1], x_sums = x[2]
    cdef const uint8_t[:, ::1] codes = matrix.codes
    cdef const float[:, :, ::1] scales = matrix.scales, zeros = matrix.zeros
    cdef Py_ssize_t rows = matrix.rows, block = matrix.block, blocks = matrix.blocks, bits = matrix.bits
    cdef Py_ssize_t group_blocks = max(1, matrix.group // block) if matrix.group < matrix.columns else blocks
    cdef Py_ssize_t tokens = out.shape[0], panels = codes.shape[0], panel
    if values.shape[0] != blocks or values.shape[1] != tokens or values.shape[2] != block or tokens > MOST_TOKENS:
        raise ValueError(f"activations of {blocks} blocks of {block} and {tokens} tokens were expected")
    if column < 0 or column + rows > out.shape[1]:
        raise ValueError("the outputs do not fit into out")
    if rows == 0 or tokens == 0 or blocks == 0:
        np.asarray(out)[:, column : column + rows] = 0
        return
    cdef bint threads = rows * blocks * block * tokens > WORTH_THREADS
    cdef bint own_zeros = zeros.shape[1] > 1 or scales.shape[1] == 1
    for panel in prange(panels, nogil=True, schedule="static", use_threads_if=threads):
        multiply_panel(&codes[panel, 0], &scales[panel, 0, 0], &zeros[panel, 0, 0], own_zeros, blocks, block,
                       group_blocks, bits, &values[0, 0, 0], &x_scales[0, 0], &x_sums[0, 0], tokens,
                       &out[0, column + panel * PANEL_ROWS], out.shape[1], min(PANEL_ROWS, rows - panel * PANEL_ROWS))


cdef void multiply_panel(const uint8_t *codes, const float *scales, const float *zeros, bint own_zeros,
                         Py_ssize_t blocks, Py_ssize_t block, Py_ssize_t group_blocks, int bits, const int16_t *x,
                         const float *x_scales, const float *x_sums, Py_ssize_t tokens, float *out,
                         Py_ssize_t out_stride, Py_ssize_t rows) noexcept nogil:
    cdef float sums[MOST_TOKENS * PANEL_ROWS]
    cdef int16_t scratch[LARGEST_BLOCK * PANEL_ROWS + CACHE_LINE]
    cdef int16_t *weights = <int16_t *>(((<uintptr_t>scratch) + CACHE_LINE) & ~<uintptr_t>(CACHE_LINE - 1))
    cdef Py_ssize_t b, group, t, r
    memset(sums, 0, sizeof(float) * tokens * PANEL_ROWS)
    for b in range(blocks):
        group = b // group_blocks
        unpack_block(codes + b * block * PANEL_ROWS * bits // 8, block, bits, weights)
        add_block(weights, block, scales + group * PANEL_ROWS, zeros + (group * PANEL_ROWS if own_zeros else 0),
                  x + b * tokens * block, x_scales + b * tokens, x_sums + b * tokens, tokens, sums)
    for t in range(tokens):
        for r in range(rows):
            out[t * out_stride + r] = sums[t * PANEL_ROWS + r]

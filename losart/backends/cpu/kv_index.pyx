"""Bookkeeping of the paged KV cache on the host: page table, page key bounds, page lists.

A page is `page_size` positions, for each layer and kv head by itself. It is made of slabs of 16
positions, keys channel-major [head_dim, 16] and values position-major [16, head_dim], because the
CPU kernels form 16 scores at a time (backends/cpu/simd.h). Pages lie in chunks:

    kv chunk      [layers, 2 (keys, values), kv_heads, slabs of the chunk, head_dim * 16]
    bounds chunk  [layers, kv_heads, pages of the chunk / 16, values] of float32

Keys and values of 8 bits are codes, and each of a position has a scale: a slab is then head_dim * 16
codes in the same order and the 16 positions' scales, float32, head_dim * 16 + 64 bytes in all.

Bounds of 16 pages, a group, are laid out as if each page were a position of a slab with twice the
channels, first the largest keys: the QUEST bound of 16 pages (arXiv 2406.10774) is then slab_scores
of [max(q, 0), min(q, 0)]. They are bounds of keys as they are held; of those of 8 bits rounded
outwards to the format that they are multiplied in on a GPU, in which it holds bounds.

    exact       [2 (largest, smallest), head_dim, 16]
    base, step  [head_dim] each
    codes       [2, head_dim] of 64 bits: a page's are 4 from 4 * page on

Once the prefix fills a group its bounds are base + code * step, rounded to the format of keys, of
those of 8 bits to that of bounds, as on a GPU (kernels_cu/cache/pages.cuh). Codes are rounded
outwards, so that these are bounds too. In a group that cannot be coded all bases are NaN.
"""

import numpy as np

from libc.math cimport NAN
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from losart.backends.cpu.simd cimport code_value, encode

from losart.config.precision import FLOAT32 as BOUNDS_FORMAT

cdef enum:
    LANES = 16

cdef float LEAST_FLOAT16_STEP = 2.0 ** -17  # less is subnormal to less than 8 bits


cdef float rounded_up(float x, int width) noexcept nogil:
    # The least number of the format that is not below x. NaN stays.
    cdef float bound = as_held(x, width)
    cdef uint16_t bits
    if bound < x:
        bits = narrow_to(x, width)
        bound = widened(bits - 1 if bits >> 15 else bits + 1, width)
    return bound


cdef inline float coded_bound(float base, float step, int code, int width) noexcept nogil:
    return as_held(base + <float>code * step, width)


cdef float step_of(float base, float largest, int width) noexcept nogil:
    # The least step of 8 significant bits, of float16 one that it holds exactly, by which code 15 reaches `largest`.
    cdef float step = (largest - base) / <float>15.0
    cdef uint32_t bits
    memcpy(&bits, &step, 4)
    bits = (bits + 0xffff) & <uint32_t>0xffff0000
    memcpy(&step, &bits, 4)
    if width == FLOAT16 and step < LEAST_FLOAT16_STEP:
        step = LEAST_FLOAT16_STEP
        memcpy(&bits, &step, 4)
    if not coded_bound(base, step, 15, width) >= largest:
        bits += 0x10000
        memcpy(&step, &bits, 4)
    return step


cdef uint64_t code_below(float base, float step, float bound, int width) noexcept nogil:
    # Of the 16 values the largest that is not above the bound.
    cdef int code = 0, more = 8
    while more:
        if coded_bound(base, step, code + more, width) <= bound:
            code += more
        more //= 2
    return code


cdef uint64_t code_above(float base, float step, float bound, int width) noexcept nogil:
    # Of the 16 values the smallest that is not below the bound.
    cdef int code = 15, less = 8
    while less:
        if coded_bound(base, step, code - less, width) >= bound:
            code -= less
        less //= 2
    return code


cdef class PageTable:
    """Where each layer's and kv head's pages lie, and writing into them.

    Parameters
    ----------
    layers, kv_heads, head_dim : int
    page_size : int
        Positions of a page, a multiple of 16.
    positions_per_chunk : int
        A multiple of 16 pages.
    kv_format : Format
        Of keys and values.
    operands : Format
        `Precision.kv_operands`, to which page bounds are rounded.
    """

    def __init__(self, layers, kv_heads, head_dim, page_size, positions_per_chunk, kv_format, operands):
        if page_size % LANES or positions_per_chunk % (LANES * page_size):
            raise ValueError("a page must be whole slabs, a chunk a multiple of 16 pages")
        self.layers = layers
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.page_size = page_size
        self.positions_per_chunk = positions_per_chunk
        self.kv_format = kv_format
        self.slab_bytes = LANES * (head_dim * kv_format.itemsize + kv_format.scale_bytes)
        self.width = kv_format.code
        self.bounds_width = operands.code
        self.chunk_count = 0
        self.arrays = []
        self.kv_addresses = np.zeros(0, np.uint64)
        self.bound_addresses = np.zeros(0, np.uint64)

    @property
    def capacity(self):
        """Positions that the chunks hold."""
        return self.chunk_count * self.positions_per_chunk

    @property
    def bounds_format(self):
        """The format of page bounds."""
        return BOUNDS_FORMAT

    @property
    def kv_shape(self):
        """Shape of a chunk of keys and values."""
        of_position = self.head_dim + self.kv_format.scale_bytes
        return (self.layers, 2, self.kv_heads, self.positions_per_chunk, of_position)

    @property
    def bounds_shape(self):
        """Shape of a chunk of page bounds, float32."""
        groups = self.positions_per_chunk // self.page_size // LANES
        return (self.layers, self.kv_heads, groups, (2 * LANES + 2 + 4) * self.head_dim)

    def add_chunk(self, kv, bounds):
        """Take two arrays of `kv_shape` and `bounds_shape` as the next chunk.

        Both must start as zeros: an element that was never written is multiplied by zero weights.
        """
        if kv.shape != self.kv_shape or kv.dtype != self.kv_format.array or not kv.flags.c_contiguous:
            raise ValueError(f"a kv chunk must be {self.kv_shape} of {self.kv_format.name}")
        if bounds.shape != self.bounds_shape or bounds.dtype != np.float32 or not bounds.flags.c_contiguous:
            raise ValueError(f"a bounds chunk must be {self.bounds_shape} of float32")
        self.arrays.append((kv, bounds))
        self.kv_addresses = np.append(self.kv_addresses, np.uint64(kv.ctypes.data))
        self.bound_addresses = np.append(self.bound_addresses, np.uint64(bounds.ctypes.data))
        self.kv_chunks = self.kv_addresses
        self.bound_chunks = self.bound_addresses
        self.chunk_count += 1

    cdef SlabSource source(self, Py_ssize_t layer, Py_ssize_t head, const int32_t *pages) noexcept nogil:
        cdef SlabSource source
        source.chunks = &self.kv_chunks[0] if self.chunk_count else NULL
        source.slabs_per_chunk = self.positions_per_chunk // LANES
        source.slab_bytes = self.slab_bytes
        source.key_offset = (layer * 2 * self.kv_heads + head) * source.slabs_per_chunk * source.slab_bytes
        source.value_offset = source.key_offset + self.kv_heads * source.slabs_per_chunk * source.slab_bytes
        source.pages = pages
        source.slabs_per_page = self.page_size // LANES
        source.width = self.width
        return source

    cdef PageBounds bounds(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t group) noexcept nogil:
        cdef Py_ssize_t groups = self.positions_per_chunk // self.page_size // LANES, dim = self.head_dim
        cdef Py_ssize_t row = (layer * self.kv_heads + head) * groups + group % groups
        cdef PageBounds bounds
        bounds.exact = <float *>self.bound_chunks[group // groups] + row * (2 * LANES + 2 + 4) * dim
        bounds.base = bounds.exact + 2 * LANES * dim
        bounds.step = bounds.base + dim
        bounds.codes = <uint64_t *>(bounds.step + dim)
        return bounds

    cdef Py_ssize_t full_groups(self, Py_ssize_t positions) noexcept nogil:
        # Groups of pages that so many positions fill.
        return positions // (LANES * self.page_size)

    cdef void write_key_value(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t position,
                              const float *key, const float *value) noexcept nogil:
        cdef SlabSource source = self.source(layer, head, NULL)
        cdef Py_ssize_t slab = position // LANES, lane = position % LANES, d
        cdef Py_ssize_t page = position // self.page_size, place = page % LANES
        cdef bint opens_page = position % self.page_size == 0
        cdef char *chunk = <char *>source.chunks[slab // source.slabs_per_chunk]
        cdef Py_ssize_t within = slab % source.slabs_per_chunk * source.slab_bytes
        cdef char *key_slab = chunk + source.key_offset + within
        cdef char *value_slab = chunk + source.value_offset + within
        cdef float *largest = self.bounds(layer, head, page // LANES).exact + place
        cdef float *smallest = largest + self.head_dim * LANES
        cdef bint coded = self.width >= INT8
        cdef float held, key_scale = 0.0
        if coded:
            key_scale = encode(key, self.head_dim, self.width, <uint8_t *>key_slab + lane, LANES)
            (<float *>(key_slab + LANES * self.head_dim))[lane] = key_scale
            (<float *>(value_slab + LANES * self.head_dim))[lane] = encode(
                value, self.head_dim, self.width, <uint8_t *>value_slab + lane * self.head_dim, 1)
        for d in range(self.head_dim):
            if coded:
                held = code_value((<uint8_t *>key_slab)[d * LANES + lane], self.width) * key_scale
            else:
                held = as_held(key[d], self.width)
            if held - held != 0.0:
                # A query of the other sign would pass over an infinite key (its score is -inf):
                # NaN shows whatever the query.
                held = <float>NAN
            if self.width == FLOAT32:
                (<float *>key_slab)[d * LANES + lane] = held
                (<float *>value_slab)[lane * self.head_dim + d] = value[d]
            elif not coded:
                (<uint16_t *>key_slab)[d * LANES + lane] = narrow_to(held, self.width)
                (<uint16_t *>value_slab)[lane * self.head_dim + d] = narrow_to(value[d], self.width)
            # The bound is that of the key as it is held, rounding included. A NaN stays, so that its
            # page is read and the NaN shows in the logits.
            if opens_page or held > largest[d * LANES] or held != held:
                largest[d * LANES] = rounded_up(held, self.bounds_width)
            if opens_page or held < smallest[d * LANES] or held != held:
                smallest[d * LANES] = -rounded_up(-held, self.bounds_width)

    cdef void code_bounds(self, Py_ssize_t layer, Py_ssize_t head, Py_ssize_t group) noexcept nogil:
        cdef PageBounds bounds = self.bounds(layer, head, group)
        cdef const float *largest
        cdef const float *smallest
        cdef uint64_t below, above
        cdef Py_ssize_t d, page
        cdef bint finite = True
        cdef float base, top, step, reached
        for d in range(self.head_dim):
            largest = bounds.exact + d * LANES
            smallest = largest + self.head_dim * LANES
            base, top = smallest[0], largest[0]
            for page in range(LANES):
                finite &= smallest[page] == smallest[page]
                base, top = min(base, smallest[page]), max(top, largest[page])
            step = step_of(base, top, self.bounds_width)
            reached = coded_bound(base, step, 15, self.bounds_width)
            finite &= reached - reached == 0.0
            above = below = 0
            for page in range(LANES):
                above |= code_above(base, step, largest[page], self.bounds_width) << 4 * page
                below |= code_below(base, step, smallest[page], self.bounds_width) << 4 * page
            bounds.base[d], bounds.step[d] = base, step
            bounds.codes[d], bounds.codes[self.head_dim + d] = above, below
        if not finite:
            for d in range(self.head_dim):
                bounds.base[d] = <float>NAN

    def write(self, Py_ssize_t layer, Py_ssize_t start, const float[:, :, ::1] k, const float[:, :, ::1] v):
        """Write keys and values at positions start, start + 1, ... and take the keys into the page bounds.

        Bounds of groups of pages that these fill are coded. A position opens its page's bounds anew when it is the page's first: positions are written
        in order, and are written again only from a page's first position on or by equal keys.

        Parameters
        ----------
        layer, start : int
        k, v : float32 [tokens, kv_heads, head_dim]
        """
        cdef Py_ssize_t tokens = k.shape[0], t, head, group
        if k.shape[1] != self.kv_heads or k.shape[2] != self.head_dim or not (
            v.shape[0] == tokens and v.shape[1] == self.kv_heads and v.shape[2] == self.head_dim
        ):
            raise ValueError("k and v must be [tokens, kv_heads, head_dim]")
        if not 0 <= layer < self.layers or start < 0 or start + tokens > self.capacity:
            raise ValueError(f"layer {layer}, positions {start} to {start + tokens} are outside the cache")
        with nogil:
            for head in range(self.kv_heads):
                for t in range(tokens):
                    self.write_key_value(layer, head, start + t, &k[t, head, 0], &v[t, head, 0])
                for group in range(self.full_groups(start), self.full_groups(start + tokens)):
                    self.code_bounds(layer, head, group)


cdef inline uint32_t ascending_key(float x) noexcept nogil:
    # Orders as the floats do, -0.0 as 0.0, NaN of either sign above all: whole numbers compare safely.
    cdef uint32_t bits
    if x != x:
        return <uint32_t>0xFFFFFFFF
    x = x + <float>0.0
    memcpy(&bits, &x, 4)
    return ~bits if bits >> 31 else bits | <uint32_t>0x80000000


cdef uint32_t kth_largest(const float *scores, Py_ssize_t count, Py_ssize_t k, Py_ssize_t *ties) noexcept nogil:
    # Radix selection, one byte of the key at a time from the top. `ties` becomes how many of those
    # equal to the k-th belong to the k largest.
    cdef Py_ssize_t histogram[256]
    cdef uint32_t prefix = 0, mask = 0, key
    cdef Py_ssize_t i
    cdef int shift, digit
    for shift in range(24, -1, -8):
        memset(histogram, 0, sizeof(histogram))
        for i in range(count):
            key = ascending_key(scores[i])
            if key & mask == prefix:
                histogram[key >> shift & 255] += 1
        digit = 255
        while histogram[digit] < k:
            k -= histogram[digit]
            digit -= 1
        prefix |= <uint32_t>digit << shift
        mask |= <uint32_t>255 << shift
    ties[0] = k
    return prefix


cdef void top_of_row(const float *scores, Py_ssize_t count, Py_ssize_t k, int32_t *ids) noexcept nogil:
    cdef Py_ssize_t ties = 0, i
    cdef uint32_t threshold = 0, key
    if k < count:
        threshold = kth_largest(scores, count, k, &ties)
    for i in range(count):
        key = ascending_key(scores[i])
        if k < count and key <= threshold:
            if key < threshold or ties == 0:
                continue
            ties -= 1
        ids[0] = <int32_t>i
        ids += 1


def top_pages(const float[:, :, ::1] scores, Py_ssize_t pages, k):
    """Top pages of every row.

    Parameters
    ----------
    scores : float32 [kv_heads, rows, >= pages]
        Of equal scores, the earlier page is taken; -0.0 equals 0.0, NaN is above all.
    pages : int
        Pages that exist; later columns are ignored.
    k : int
        Pages that each row picks, 1 or more; all of them where there are fewer.

    Returns
    -------
    int32 [kv_heads, rows, min(k, pages)]
        Ascending page ids.
    """
    cdef Py_ssize_t heads = scores.shape[0], rows = scores.shape[1], head, row
    if not 0 <= pages <= scores.shape[2] or k < 1:
        raise ValueError("pages must be within the scores, k at least 1")
    cdef Py_ssize_t each = min(k, pages)  # k may be any integer
    ids = np.empty((heads, rows, each), np.int32)
    cdef int32_t[:, :, ::1] view = ids
    if ids.size:
        with nogil:
            for head in range(heads):
                for row in range(rows):
                    top_of_row(&scores[head, row, 0], pages, each, &view[head, row, 0])
    return ids


def united(const int32_t[:, :, ::1] selected, Py_ssize_t pages):
    """Pages that rows have selected, united per kv head.

    Parameters
    ----------
    selected : int32 [kv_heads, rows, any]
        Page ids in any order.
    pages : int
        Pages that exist.

    Returns
    -------
    ids : int32 [kv_heads, min(pages, rows * any)]
        Ascending page ids, valid up to the head's count.
    counts : int32 [kv_heads]
    """
    cdef Py_ssize_t heads = selected.shape[0], head, row, column, page, filled
    ids = np.zeros((heads, min(pages, selected.shape[1] * selected.shape[2])), np.int32)
    counts = np.zeros(heads, np.int32)
    if ids.size == 0:
        return ids, counts
    if not (0 <= np.asarray(selected).min() and np.asarray(selected).max() < pages):
        raise ValueError("selected pages must exist")
    cdef int32_t[:, ::1] id_view = ids
    cdef int32_t[::1] count_view = counts
    marks = np.empty(pages, np.uint8)
    cdef unsigned char[::1] mark_view = marks
    with nogil:
        for head in range(heads):
            memset(&mark_view[0], 0, pages)
            for row in range(selected.shape[1]):
                for column in range(selected.shape[2]):
                    mark_view[selected[head, row, column]] = 1
            filled = 0
            for page in range(pages):
                if mark_view[page]:
                    id_view[head, filled] = <int32_t>page
                    filled += 1
            count_view[head] = <int32_t>filled
    return ids, counts


def mark_pages(const int32_t[:, :, ::1] selected, tokens, Py_ssize_t group, Py_ssize_t words):
    """Pages that rows have selected, united per kv head.

    Parameters
    ----------
    selected : int32 [kv_heads, rows, count]
        Page ids in any order, -1 for none.
    tokens : int32 [any] or None
        Whose rows count, `group` rows each; None: all rows.
    group : int
    words : int
        32 times as many pages can be marked.

    Returns
    -------
    uint32 [kv_heads, words]
        One bit per page.
    """
    cdef Py_ssize_t heads = selected.shape[0], rows = selected.shape[1], head, i, row, column, page
    marks = np.zeros((heads, words), np.uint32)
    cdef uint32_t[:, ::1] view = marks
    chosen = np.arange(rows) if tokens is None else (
        np.asarray(tokens)[:, None] * group + np.arange(group)).reshape(-1)
    cdef const int64_t[::1] wanted = np.ascontiguousarray(chosen, np.int64)
    if len(chosen) and not (0 <= chosen.min() and chosen.max() < rows):
        raise ValueError("tokens must be within the rows")
    if selected.size and np.asarray(selected).max() >= 32 * words:
        raise ValueError("pages must be within the words")
    with nogil:
        for head in range(heads):
            for i in range(wanted.shape[0]):
                row = wanted[i]
                for column in range(selected.shape[2]):
                    page = selected[head, row, column]
                    if page >= 0:
                        view[head, page >> 5] |= <uint32_t>1 << (page & 31)
    return marks


def positions_in(const int32_t[:, ::1] ids, const int32_t[::1] counts, Py_ssize_t page_size, Py_ssize_t length):
    """Positions that a page list covers, summed over kv heads.

    Parameters
    ----------
    ids : int32 [kv_heads, capacity]
        Ascending page ids.
    counts : int32 [kv_heads]
    page_size : int
    length : int
        Length of the prefix; its last page may be part full.

    Returns
    -------
    int
    """
    cdef Py_ssize_t head, total = 0, last
    for head in range(counts.shape[0]):
        if counts[head]:
            last = ids[head, counts[head] - 1]
            total += (counts[head] - 1) * page_size + min(page_size, length - last * page_size)
    return total

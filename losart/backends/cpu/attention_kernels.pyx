"""Attention of a block on the CPU: over pages of the prefix, over the block itself, and page bounds.

All variants are one routine, attend_slabs: rows of queries of one kv head (tokens times the query
heads that share it) against a list of slabs of 16 positions (see kv_index.pyx), by the online
softmax, one tile of 8 slabs at a time. Work is split over kv heads and over parts of the list whose
size does not depend on the number of threads, so results do not either.
"""

import numpy as np

from libc.math cimport INFINITY, log, sqrt
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from losart.backends.cpu.kv_index cimport BFLOAT16, FLOAT32, INT8, PageBounds, PageTable, SlabSource, as_held
from losart.backends.cpu.pool cimport parallel_for
from losart.backends.cpu.simd cimport (
    decode_bounds,
    scale,
    simd_level,
    slab_scores,
    slabs_accumulate,
    softmax_step,
    widen_bfloat16,
    widen_codes,
    widen_float16,
)

cdef extern from "math.h" nogil:
    float expf(float x)

cdef enum:
    LANES = 16
    TILE = 8             # slabs of a tile
    PART = 64            # slabs of a part, whole tiles
    CAUSAL_ROWS = 64     # query rows of a prefill work item, about
    BOUND_GROUPS = 8     # groups of 16 pages of a work item
    WIDENED = 16384      # numbers of a work item
    WORTH_THREADS = 1 << 20   # multiply-adds, about 20 us

SLAB_POSITIONS = LANES
TILE_POSITIONS = TILE * LANES


def vectors_in_use():
    """2 where the kernels run on AVX-512, 1 on AVX2, 0 on what every machine has."""
    return simd_level()


cdef struct Work:
    # What attend_part and merge_row need; arrays by kv head.
    Py_ssize_t kv_heads, group, rows, dim, parts
    const float *q              # [kv_heads, rows, dim], scaled
    const int32_t *limits       # [kv_heads, rows]
    const SlabSource *sources   # [kv_heads]
    const Py_ssize_t *slabs     # [kv_heads]
    float *o                    # [kv_heads, parts, rows, dim], unnormalised
    float *tops                 # [kv_heads, parts, rows], maximum
    float *totals               # [kv_heads, parts, rows], sum relative to it
    float *slab_sums            # [kv_heads, rows, sums_stride] or NULL
    float *tile_tops            # [kv_heads, rows, tops_stride] or NULL
    Py_ssize_t sums_stride, tops_stride
    const int32_t *tokens       # [rows / group]
    float *out                  # [any tokens, heads, dim]
    float *lse                  # [any tokens, heads]
    bint failed                 # some part had no memory


cdef inline void widen(const void *source, float *to, Py_ssize_t count, int width) noexcept nogil:
    if width == BFLOAT16:
        widen_bfloat16(<const uint16_t *>source, to, count)
    else:
        widen_float16(<const uint16_t *>source, to, count)


cdef inline void widen_slab(const char *slab, float *to, Py_ssize_t dim, int width, bint keys) noexcept nogil:
    if width >= INT8:
        widen_codes(<const uint8_t *>slab, to, dim, width, keys)
    else:
        widen(slab, to, LANES * dim, width)


cdef int attend_slabs(
    const float *q, const int32_t *limits, Py_ssize_t rows, Py_ssize_t dim,
    const SlabSource *source, Py_ssize_t first, Py_ssize_t last,
    float *o, float *tops, float *totals,
    float *slab_sums, Py_ssize_t sums_stride, float *tile_tops, Py_ssize_t tops_stride,
) noexcept nogil:
    # Rows q [rows, dim] over slabs first..last-1 of the list; row r sees the positions of the list
    # below limits[r]. Returns 1 without memory.
    cdef Py_ssize_t slab = first, b, slabs, r, page, index, place, lanes, stride = TILE * LANES
    cdef Py_ssize_t slab_floats = LANES * dim
    cdef const char *chunk
    cdef const char *key
    cdef const float *values[TILE]
    cdef float factor
    cdef float *scores = <float *>malloc(sizeof(float) * (rows * stride + (TILE + 1) * slab_floats))
    if scores == NULL:
        return 1
    cdef float *key_scratch = scores + rows * stride
    cdef float *value_scratch = key_scratch + slab_floats

    memset(o, 0, sizeof(float) * rows * dim)
    for r in range(rows):
        tops[r] = -INFINITY
        totals[r] = 0.0
    while slab < last:
        slabs = min(TILE, last - slab)
        for b in range(slabs):
            index = slab + b
            if source.pages != NULL:
                page = source.pages[index // source.slabs_per_page]
                index = page * source.slabs_per_page + index % source.slabs_per_page
            chunk = <const char *><uintptr_t>source.chunks[index // source.slabs_per_chunk]
            place = index % source.slabs_per_chunk * source.slab_bytes
            key = chunk + source.key_offset + place
            if source.width == FLOAT32:
                values[b] = <const float *>(chunk + source.value_offset + place)
            else:
                widen_slab(key, key_scratch, dim, source.width, True)
                key = <const char *>key_scratch
                widen_slab(chunk + source.value_offset + place, value_scratch + b * slab_floats, dim,
                           source.width, False)
                values[b] = value_scratch + b * slab_floats
            slab_scores(q, rows, dim, <const float *>key, scores + b * LANES, stride)
        for r in range(rows):
            lanes = limits[r] - slab * LANES
            for b in range(max(lanes, 0), slabs * LANES):
                scores[r * stride + b] = -INFINITY
            factor = softmax_step(scores + r * stride, slabs, tops + r, totals + r,
                                  slab_sums + r * sums_stride + slab if slab_sums != NULL else NULL)
            if factor != 1.0:
                scale(o + r * dim, dim, factor)
            if tile_tops != NULL:
                tile_tops[r * tops_stride + slab // TILE] = tops[r]
        slabs_accumulate(scores, stride, rows, values, slabs, dim, o)
        slab += slabs
    free(scores)
    return 0


cdef void attend_part(void *state, Py_ssize_t item) noexcept nogil:
    cdef Work *work = <Work *>state
    cdef Py_ssize_t head = item // work.parts, part = item % work.parts, rows = work.rows
    if attend_slabs(
        work.q + head * rows * work.dim, work.limits + head * rows, rows, work.dim,
        work.sources + head, part * PART, min((part + 1) * PART, work.slabs[head]),
        work.o + item * rows * work.dim, work.tops + item * rows, work.totals + item * rows,
        work.slab_sums + head * rows * work.sums_stride if work.slab_sums != NULL else NULL,
        work.sums_stride,
        work.tile_tops + head * rows * work.tops_stride if work.tile_tops != NULL else NULL,
        work.tops_stride,
    ):
        work.failed = True


cdef void finish_row(const float *o, float top, float total, Py_ssize_t dim,
                     float *out, float *lse) noexcept nogil:
    # A row that saw no position has o = 0 and lse = -inf.
    cdef Py_ssize_t d
    cdef float inverse = <float>0.0 if total == 0.0 else <float>1.0 / total
    for d in range(dim):
        out[d] = o[d] * inverse
    lse[0] = <float>-INFINITY if total == 0.0 else top + <float>log(total)


cdef void merge_row(void *state, Py_ssize_t item) noexcept nogil:
    # One row's parts into its output. The first part's o is used up.
    cdef const Work *work = <const Work *>state
    cdef Py_ssize_t head = item // work.rows, row = item % work.rows, group = work.group
    cdef Py_ssize_t to = (work.tokens[row // group] * work.kv_heads + head) * group + row % group
    cdef Py_ssize_t part, d, first = head * work.parts * work.rows + row, at
    cdef float top = -INFINITY, total = 0.0, factor
    cdef float *into = work.o + first * work.dim
    cdef const float *other
    for part in range(work.parts):
        top = max(top, work.tops[first + part * work.rows])
    for part in range(work.parts):
        at = first + part * work.rows
        # Parts that saw nothing (-inf) have sums of zero, or NaN, and count as they are.
        factor = expf(work.tops[at] - top) if work.tops[at] > -INFINITY else <float>1.0
        total = total + work.totals[at] * factor
        if part == 0:
            scale(into, work.dim, factor)
        else:
            other = work.o + at * work.dim
            for d in range(work.dim):
                into[d] = into[d] + other[d] * factor
    finish_row(into, top, total, work.dim, work.out + to * work.dim, work.lse + to)


def _gather_queries(const float[:, :, ::1] q, const int32_t[::1] tokens, Py_ssize_t kv_heads, bint scaled=True):
    # [kv_heads, rows, head_dim]: rows (token, head of the group), scaled by 1/sqrt(head_dim) or not.
    cdef Py_ssize_t count = tokens.shape[0], dim = q.shape[2], group = q.shape[1] // kv_heads, head, t
    rows = np.empty((kv_heads, count * group, dim), np.float32)
    cdef float[:, :, ::1] out = rows
    with nogil:
        for head in range(kv_heads):
            for t in range(count):
                memcpy(&out[head, t * group, 0], &q[tokens[t], head * group, 0], sizeof(float) * group * dim)
        if scaled:
            scale(&out[0, 0, 0], kv_heads * count * group * dim, <float>(1.0 / sqrt(<double>dim)))
    return rows


cdef int attend_sources(const SlabSource *sources, const Py_ssize_t[::1] positions, q, const int32_t[::1] tokens,
                        float[:, :, ::1] o, float[:, ::1] lse,
                        float[:, :, ::1] slab_sums=None, float[:, :, ::1] tile_tops=None) except -1:
    # Queries of some tokens over so many positions of each kv head's source: all parts, then every row's merge.
    cdef Py_ssize_t kv_heads = positions.shape[0], group = o.shape[1] // kv_heads, dim = o.shape[2]
    cdef Py_ssize_t rows = tokens.shape[0] * group
    slabs = -(-np.asarray(positions) // LANES)
    cdef const Py_ssize_t[::1] slab_view = slabs
    cdef const int32_t[:, ::1] limits = np.repeat(np.asarray(positions, np.int32), rows).reshape(kv_heads, rows)
    cdef const float[:, :, ::1] queries = _gather_queries(q, tokens, kv_heads)
    cdef bint threads = 2 * rows * dim * LANES * slabs.sum() > WORTH_THREADS
    cdef Work work
    memset(&work, 0, sizeof(work))
    work.kv_heads, work.group, work.rows, work.dim = kv_heads, group, rows, dim
    work.parts = max(1, -(-slabs.max() // PART))
    work.q, work.limits, work.sources, work.slabs = &queries[0, 0, 0], &limits[0, 0], sources, &slab_view[0]
    if slab_sums is not None:
        work.slab_sums, work.sums_stride = &slab_sums[0, 0, 0], slab_sums.shape[2]
        work.tile_tops, work.tops_stride = &tile_tops[0, 0, 0], tile_tops.shape[2]
    cdef float[::1] buffer = np.empty(kv_heads * work.parts * rows * (dim + 2), np.float32)
    work.o = &buffer[0]
    work.tops = work.o + kv_heads * work.parts * rows * dim
    work.totals = work.tops + kv_heads * work.parts * rows
    work.tokens, work.out, work.lse = &tokens[0], &o[0, 0, 0], &lse[0, 0]
    with nogil:
        parallel_for(attend_part, &work, kv_heads * work.parts, threads)
        if not work.failed:
            parallel_for(merge_row, &work, kv_heads * rows, threads and work.parts > 1)
    if work.failed:
        raise MemoryError
    return 0


def _check(q, o, lse, tokens, kv_heads, dim):
    if q.shape[2] != dim or q.shape[1] % kv_heads or o.shape != q.shape or lse.shape != q.shape[:2]:
        raise ValueError("q and o must be [tokens, heads, head_dim] and lse [tokens, heads]")
    if dim % LANES:
        raise ValueError(f"head_dim must be a multiple of {LANES}, not {dim}")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(q):
        raise ValueError("tokens must be rows of q")


def attend_pages(PageTable table, Py_ssize_t layer, q, tokens, pages, Py_ssize_t length, o, lse,
                 slab_sums=None, tile_tops=None):
    """Attention of some tokens' queries over the prefix, or over a list of its pages.

    Parameters
    ----------
    table : PageTable
    layer : int
    q : float32 [tokens of the block, heads, head_dim]
    tokens : int32 [any]
        Which tokens are computed; the other rows of `o` and `lse` stay as they are.
    pages : (int32 [kv_heads, capacity], int32 [kv_heads]) or None
        Ascending page ids that each kv head reads, and how many; None reads the whole prefix.
    length : int
        Positions of the prefix.
    o : float32 [tokens of the block, heads, head_dim]
        Written; zeros where nothing is read.
    lse : float32 [tokens of the block, heads]
        Written: natural logarithm of the sum of exponentials; -inf where nothing is read.
    slab_sums : float32 [kv_heads, tokens * group, slabs], optional
    tile_tops : float32 [kv_heads, tokens * group, tiles], optional
        Written: each slab's sum of exponentials, relative to the maximum up to its tile of 8 slabs.
    """
    cdef Py_ssize_t kv_heads = table.kv_heads, head, listed, last_page
    _check(q, o, lse, tokens, kv_heads, table.head_dim)
    if not 0 <= layer < table.layers or not 0 <= length <= table.capacity:
        raise ValueError(f"layer {layer} and {length} positions are outside the cache")
    if slab_sums is not None and (pages is not None or slab_sums.shape[2] * LANES < length
                                  or tile_tops.shape[2] * TILE * LANES < length):
        raise ValueError("slab_sums and tile_tops must hold the whole prefix")
    if not len(tokens):
        return

    cdef const int32_t[:, ::1] ids
    cdef const int32_t[::1] counts
    if pages is not None:
        ids, counts = pages
    cdef Py_ssize_t[::1] positions = np.full(kv_heads, length, np.intp)
    cdef unsigned char[::1] source_bytes = np.empty(kv_heads * sizeof(SlabSource), np.uint8)
    cdef SlabSource *sources = <SlabSource *>&source_bytes[0]
    for head in range(kv_heads):
        if pages is not None:
            listed = counts[head]
            last_page = ids[head, listed - 1] if listed else 0
            if listed and (ids[head, 0] < 0 or last_page * table.page_size >= length):
                raise ValueError("a page of the list is outside the prefix")
            positions[head] = (listed - 1) * table.page_size + min(
                table.page_size, length - last_page * table.page_size) if listed else 0
        sources[head] = table.source(layer, head, &ids[head, 0] if pages is not None and positions[head] else NULL)
    attend_sources(sources, positions, q, tokens, o, lse, slab_sums, tile_tops)


def attend_block(const float[:, :, ::1] q, const float[:, :, ::1] k, const float[:, :, ::1] v, o, lse):
    """Attention of a block's tokens over the block's own keys and values, all to all.

    Parameters
    ----------
    q : float32 [tokens, heads, head_dim]
    k, v : float32 [tokens, kv_heads, head_dim]
    o : float32 [tokens, heads, head_dim]
        Written.
    lse : float32 [tokens, heads]
        Written.
    """
    cdef Py_ssize_t count = q.shape[0], kv_heads = k.shape[1], dim = q.shape[2], head, t, d
    cdef Py_ssize_t slabs = (count + LANES - 1) // LANES
    tokens = np.arange(count, dtype=np.int32)
    _check(q.base, o, lse, tokens, kv_heads, dim)
    # The block as one chunk of the cache's layout: [2 (keys, values), kv_heads, slabs, dim * 16].
    staged = np.zeros((2, kv_heads, slabs * LANES * dim), np.float32)
    cdef float[:, :, ::1] stage = staged
    with nogil:
        for head in range(kv_heads):
            for t in range(count):
                for d in range(dim):
                    stage[0, head, (t // LANES * dim + d) * LANES + t % LANES] = k[t, head, d]
                memcpy(&stage[1, head, t * dim], &v[t, head, 0], sizeof(float) * dim)
    cdef uint64_t chunk = <uint64_t><uintptr_t>&stage[0, 0, 0]

    cdef unsigned char[::1] source_bytes = np.zeros(kv_heads * sizeof(SlabSource), np.uint8)
    cdef SlabSource *sources = <SlabSource *>&source_bytes[0]
    for head in range(kv_heads):
        sources[head].chunks = &chunk
        sources[head].slabs_per_chunk = slabs
        sources[head].slab_bytes = LANES * dim * sizeof(float)
        sources[head].key_offset = head * slabs * sources[head].slab_bytes
        sources[head].value_offset = (kv_heads + head) * slabs * sources[head].slab_bytes
        sources[head].width = FLOAT32
    attend_sources(sources, np.full(kv_heads, count, np.intp), q.base, tokens, o, lse)


cdef struct CausalWork:
    void *table                 # PageTable
    Py_ssize_t layer, kv_heads, group, dim
    Py_ssize_t count, start, block_length   # tokens
    Py_ssize_t step, pieces     # tokens of a piece
    const float *q              # [kv_heads, rows, dim], scaled
    float *o                    # [tokens, heads, dim]
    bint failed


cdef void attend_causal_piece(void *state, Py_ssize_t item) noexcept nogil:
    # Later pieces see more: they come first, so that none is left over at the end.
    cdef CausalWork *work = <CausalWork *>state
    cdef Py_ssize_t head = item % work.kv_heads, first = (work.pieces - 1 - item // work.kv_heads) * work.step
    cdef Py_ssize_t group = work.group, dim = work.dim, rows = min(work.step, work.count - first) * group
    cdef const float *q = work.q + (head * work.count + first) * group * dim
    cdef Py_ssize_t r, position
    cdef SlabSource source = (<PageTable>work.table).source(work.layer, head, NULL)
    cdef float lse
    cdef float *sums = <float *>malloc(sizeof(float) * rows * (dim + 2) + sizeof(int32_t) * rows)
    if sums == NULL:
        work.failed = True
        return
    cdef float *tops = sums + rows * dim
    cdef float *totals = tops + rows
    cdef int32_t *limits = <int32_t *>(totals + rows)
    for r in range(rows):
        position = work.start + first + r // group
        limits[r] = <int32_t>((position // work.block_length + 1) * work.block_length)
    if attend_slabs(q, limits, rows, dim, &source, 0, (limits[rows - 1] + LANES - 1) // LANES,
                    sums, tops, totals, NULL, 0, NULL, 0):
        work.failed = True
    else:
        for r in range(rows):
            finish_row(sums + r * dim, tops[r], totals[r], dim,
                       work.o + (((first + r // group) * work.kv_heads + head) * group + r % group) * dim, &lse)
    free(sums)


def attend_causal_blocks(PageTable table, Py_ssize_t layer, q, Py_ssize_t start, Py_ssize_t block_length, o):
    """Block-causal attention of a piece of the prompt whose keys and values are in the cache.

    Parameters
    ----------
    table : PageTable
    layer : int
    q : float32 [tokens, heads, head_dim]
        Positions start, start + 1, ...; start and the number of tokens are whole blocks.
    start, block_length : int
        A token sees all positions up to the end of its own block.
    o : float32 [tokens, heads, head_dim]
        Written.
    """
    cdef Py_ssize_t kv_heads = table.kv_heads, dim = table.head_dim, heads = q.shape[1], group = heads // kv_heads
    cdef Py_ssize_t count = q.shape[0], step = max(1, CAUSAL_ROWS // group)
    tokens = np.arange(count, dtype=np.int32)
    _check(q, o, np.broadcast_to(np.float32(0), q.shape[:2]), tokens, kv_heads, dim)
    if count == 0:
        return
    if start % block_length or count % block_length or start + count > table.capacity:
        raise ValueError("a piece of the prompt must be whole blocks within the cache")
    cdef float[:, :, ::1] queries = _gather_queries(q, tokens, kv_heads)
    cdef float[:, :, ::1] out = o
    cdef CausalWork work = CausalWork(<void *>table, layer, kv_heads, group, dim, count, start, block_length, step,
                                      (count + step - 1) // step, &queries[0, 0, 0], &out[0, 0, 0], False)
    with nogil:
        parallel_for(attend_causal_piece, &work, work.pieces * kv_heads,
                     2 * heads * count * dim * (start + count) > WORTH_THREADS)
    if work.failed:
        raise MemoryError


cdef struct BoundWork:
    void *table                 # PageTable
    Py_ssize_t layer, rows, dim
    Py_ssize_t groups, full     # of pages; those that are full are coded
    Py_ssize_t works            # of a kv head
    int width                   # of coded bounds
    const float *q              # [kv_heads, rows, 2 * dim]
    float *scores               # [kv_heads, rows, groups, 16]
    bint failed


cdef void score_bounds(void *state, Py_ssize_t item) noexcept nogil:
    # BOUND_GROUPS groups of a kv head.
    cdef BoundWork *work = <BoundWork *>state
    cdef Py_ssize_t head = item // work.works, first = item % work.works * BOUND_GROUPS, dim = work.dim, group
    cdef Py_ssize_t stride = work.groups * LANES
    cdef PageBounds bounds
    cdef float *decoded = <float *>malloc(sizeof(float) * 2 * dim * LANES)
    cdef const float *values
    if decoded == NULL:
        work.failed = True
        return
    for group in range(first, min(work.groups, first + BOUND_GROUPS)):
        bounds = (<PageTable>work.table).bounds(work.layer, head, group)
        values = bounds.exact
        if group < work.full and bounds.base[0] == bounds.base[0]:
            decode_bounds(bounds.codes, bounds.base, bounds.step, dim, work.width, decoded)
            values = decoded
        slab_scores(work.q + head * work.rows * 2 * dim, work.rows, 2 * dim, values,
                    work.scores + head * work.rows * stride + group * LANES, stride)
    free(decoded)


def bound_scores(PageTable table, Py_ssize_t layer, q, tokens, Py_ssize_t length):
    """Upper bound of each page's scores for some tokens' queries (QUEST, arXiv 2406.10774).

    Parameters
    ----------
    table : PageTable
    layer : int
    q : float32 [tokens of the block, heads, head_dim]
    tokens : int32 [any]
    length : int
        Positions of the prefix.

    Returns
    -------
    float32 [kv_heads, tokens * group, pages rounded up to 16]
        sum over channels of max(q * smallest key, q * largest key), q rounded to the format of bounds, and
        bounds by their codes where a group of pages has them; columns past the last page are meaningless.
    """
    cdef Py_ssize_t kv_heads = table.kv_heads, dim = table.head_dim, rows, groups, works, item
    rows = len(tokens) * (q.shape[1] // kv_heads)
    groups = (length + table.page_size * LANES - 1) // (table.page_size * LANES)
    if not 0 <= layer < table.layers or not 0 <= length <= table.capacity:
        raise ValueError(f"layer {layer} and {length} positions are outside the cache")
    scores = np.empty((kv_heads, rows, groups * LANES), np.float32)
    if scores.size == 0:
        return scores
    gathered = _gather_queries(q, tokens, kv_heads, scaled=False)
    cdef float[::1] flat = gathered.reshape(-1)
    for item in range(flat.shape[0]):
        flat[item] = as_held(flat[item], table.bounds_width)
    signed = np.concatenate([np.maximum(gathered, 0), np.minimum(gathered, 0)], axis=2)
    cdef float[:, :, ::1] queries = signed
    cdef float[:, :, ::1] out = scores
    works = (groups + BOUND_GROUPS - 1) // BOUND_GROUPS
    cdef BoundWork work = BoundWork(<void *>table, layer, rows, dim, groups, table.full_groups(length), works,
                                    table.bounds_width, &queries[0, 0, 0], &out[0, 0, 0], False)
    with nogil:
        parallel_for(score_bounds, &work, kv_heads * works,
                     kv_heads * rows * 2 * dim * groups * LANES > WORTH_THREADS)
    if work.failed:
        raise MemoryError
    return scores


cdef struct WidenWork:
    const uint16_t *source
    float *to
    Py_ssize_t count
    int width


cdef void widen_piece(void *state, Py_ssize_t item) noexcept nogil:
    cdef const WidenWork *work = <const WidenWork *>state
    cdef Py_ssize_t first = item * WIDENED
    widen(work.source + first, work.to + first, min(WIDENED, work.count - first), work.width)


def widen_into(const uint16_t[::1] source, float[::1] to, int width, bint threads=True):
    """Convert bfloat16 or float16 bits to float32.

    Parameters
    ----------
    source : uint16 [n]
    to : float32 [n]
        Written.
    width : int
        `Format.code` of the source.
    threads : bool
        Whether to use all threads where it pays, or the caller's alone.
    """
    cdef Py_ssize_t count = source.shape[0]
    if to.shape[0] != count:
        raise ValueError("source and to must have the same length")
    if count == 0:
        return
    cdef WidenWork work = WidenWork(&source[0], &to[0], count, width)
    with nogil:
        parallel_for(widen_piece, &work, (count + WIDENED - 1) // WIDENED, threads and count > WORTH_THREADS // 4)

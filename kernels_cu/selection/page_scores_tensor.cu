/* page_scores.cu on tensor cores, for 16-bit bounds: a matmul of pages and rows over 2 * head_dim channels.
 *
 * Compiled with HEAD_DIM (64 or 128), ROW_TILES, tiles of SCORES_ROW_TILE rows per thread block: up to 4, or 8, and
 * STAGES. A warp takes a group of 16 pages at a time, whose codes, bases and steps are copied to a ring of STAGES of
 * its own in shared memory. Which channel is where in the matmul does not matter as long as both sides agree: of each
 * 32 channels, lane 4 g + t has the 8 from 8 t on, of pages g and g + 8. Rows are in shared memory in the order in
 * which lanes read them.
 *
 * Grid: (kv_heads, blocks that share_of_block divides, rows / (SCORES_ROW_TILE * ROW_TILES)). Must read the codes,
 * bases and steps, which it does once per z: 20 * head_dim bytes per kv head and 16 pages. */
static_assert(SCORES_THREADS == 256 && SCORES_ROW_TILE == 8, "8 warps; columns of a B fragment");
#define LANE_PIECES (HEAD_DIM / 32) /* 8 channels each, of a lane and kind */
#define CHUNKS (2 * LANE_PIECES)
#define ROWS_AT_ONCE (ROW_TILES < 4 ? ROW_TILES : 4) /* tiles whose loads are in flight at once */
/* A stage, in pieces of 16 bytes: bases, steps, and codes with a gap after each page's, against bank conflicts. */
#define PAGE_STRIDE (LANE_PIECES + 1)
#define STAGE_PIECES (HEAD_DIM / 4 + 2 * GROUP_PAGES * PAGE_STRIDE)

/* Rows from first_row on as [CHUNKS][tiles][lane]: a lane's 8 channels of row lane / 4, zeros where there is no query.
 * A warp has a chunk, and all loads of some tiles in flight at once. */
__device__ __forceinline__ void prepare_rows(uint4 *row_pieces, int tiles, const float *q, const int *tokens,
                                             int first_row, int rows, int kv_head, int group, int heads)
{
    static_assert(CHUNKS <= SCORES_THREADS / WARP, "one chunk per warp");
    int lane = threadIdx.x % WARP, chunk = threadIdx.x / WARP;
    int channel = (chunk % LANE_PIECES * 4 + lane % 4) * 8;
    float sign = chunk < LANE_PIECES ? -1.0f : 1.0f; /* the first channels meet the smallest keys */
    if (chunk >= CHUNKS) return;
#pragma unroll 1
    for (int some = 0; some < tiles; some += ROWS_AT_ONCE) {
        int index = query_index(tokens, first_row + some * SCORES_ROW_TILE + lane, rows, kv_head, group, heads);
        float4 x[ROWS_AT_ONCE], y[ROWS_AT_ONCE];
        bool exists[ROWS_AT_ONCE];
#pragma unroll
        for (int n = 0; n < ROWS_AT_ONCE; n++) {
            if (some + n >= tiles) continue;
            int at = __shfl_sync(~0u, index, n * 8 + lane / 4);
            const float4 *from = (const float4 *)(q + (size_t)max(at, 0) * HEAD_DIM + channel);
            x[n] = from[0], y[n] = from[1], exists[n] = at >= 0;
        }
#pragma unroll
        for (int n = 0; n < ROWS_AT_ONCE; n++) {
            auto part = [&](float a, float b) {
                return pack<KVOperand>(exists[n] && a * sign > 0 ? a : 0.0f, exists[n] && b * sign > 0 ? b : 0.0f);
            };
            if (some + n < tiles)
                row_pieces[(chunk * tiles + some + n) * WARP + lane] =
                    make_uint4(part(x[n].x, x[n].y), part(x[n].z, x[n].w), part(y[n].x, y[n].y), part(y[n].z, y[n].w));
        }
    }
}

/* Tiles of rows from first_row on that have a query: tokens are ascending, and then negative. */
__device__ __forceinline__ int used_tiles(const int *tokens, int rows, int first_row, int group)
{
    int left = rows - first_row;
    if (tokens) {
        int count = 0;
        for (int i = threadIdx.x % WARP; i < rows / group; i += WARP) count += tokens[i] >= 0;
        left = __reduce_add_sync(~0u, count) * group - first_row;
    }
    return min(max((left + 7) / 8, 0), ROW_TILES);
}

/* Codes as pairs of 16-bit numbers: in the low bits of one whose last bit counts as 1, which then comes off. */
#if OPERAND_FORMAT == BFLOAT16
#define CODE_OFFSET 0x43004300u /* 128 */
#define PAIR_OF_ONES 0x3f803f80u
#else
#define CODE_OFFSET 0x64006400u /* 1,024 */
#define PAIR_OF_ONES 0x3c003c00u
#endif

__device__ __forceinline__ unsigned decode_pair(unsigned codes, unsigned base, unsigned step)
{
    unsigned whole = fma_pair(codes & 0x000f000f | CODE_OFFSET, PAIR_OF_ONES, CODE_OFFSET | 0x80008000);
    return fma_pair(whole, step, base);
}

/* The bounds of 8 channels. */
__device__ __forceinline__ uint4 decode(unsigned codes, uint4 base, uint4 step)
{
    return make_uint4(decode_pair(codes, base.x, step.x), decode_pair(codes >> 4, base.y, step.y),
                      decode_pair(codes >> 8, base.z, step.z), decode_pair(codes >> 12, base.w, step.w));
}

extern "C" __global__ void __launch_bounds__(SCORES_THREADS, 2)
    page_scores_tensor(const float *q, const int *tokens, int count, int sequence_tokens, int heads, CachesView caches,
                       float *scores, int stride, unsigned *marks, int words, int sequences, int fixed)
{
    extern __shared__ uint4 shared[];
    int kv_head = blockIdx.x, group = heads / caches.kv_heads, rows = count * group;
    /* Shares that depend on the tokens are known when these are; else the first bounds can be on their way. */
    if (!fixed) wait_for_previous();
    SequenceShare mine = share_of_block(tokens, count, sequences, fixed, (int *)shared, nullptr);
    if (mine.sequence < 0) {
        clear_marks(marks, sequences * caches.kv_heads, words);
        return;
    }
    int sequence = mine.sequence, first_row = blockIdx.z * (SCORES_ROW_TILE * ROW_TILES);
    CacheView cache = caches.of(sequence);
    if (tokens) tokens += sequence * count;
    q += (size_t)sequence * sequence_tokens * heads * HEAD_DIM;
    int head = sequence * cache.kv_heads + kv_head; /* among those of all sequences */
    int length = *cache.length, pages = cache.pages(length), chunk_groups = cache.chunk_groups();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int tile = warp * mine.parts + mine.part, step = mine.parts * (SCORES_THREADS / WARP); /* few: some in each block */
    int tiles = (pages + GROUP_PAGES - 1) / GROUP_PAGES, full = cache.full_groups(length);
    uint4 *ring = shared + warp * STAGES * STAGE_PIECES, *row_pieces = shared + 8 * STAGES * STAGE_PIECES;
    auto copy = [&](int next, uint4 *stage) {
        if (next < full) {
            const uint4 *from = (const uint4 *)cache.bounds(kv_head, next, chunk_groups).base();
#pragma unroll 1
            for (int i = lane; i < HEAD_DIM / 4 + 2 * GROUP_PAGES * LANE_PIECES; i += WARP) {
                int gaps = max(i - HEAD_DIM / 4, 0) / LANE_PIECES;
                copy_16_bytes_async(shared_address(stage + i + gaps), from + i);
            }
        }
        commit_copies();
    };
    /* The prefix was complete before the pass began. */
    for (int i = 0; i < STAGES; i++) copy(tile + i * step, ring + i * STAGE_PIECES);
    wait_for_previous();
    let_next_start();
    clear_marks(marks, sequences * cache.kv_heads, words);
    int row_tiles = used_tiles(tokens, rows, first_row, group);
    if (row_tiles == 0) return;
    prepare_rows(row_pieces, row_tiles, q, tokens, first_row, rows, kv_head, group, heads);
    __syncthreads();
    unsigned pieces = shared_address(row_pieces + lane);
    for (int turn = 0; tile < tiles; tile += step, turn = (turn + 1) % STAGES) {
        wait_copies<STAGES - 1>();
        __syncwarp();
        uint4 *stage = ring + turn * STAGE_PIECES;
        const uint4 *bases = stage + t, *steps = bases + HEAD_DIM / 8;
        const unsigned *codes = (const unsigned *)(stage + HEAD_DIM / 4 + g * PAGE_STRIDE) + t;
        /* Where all bases are NaN, the first is not equal to itself. */
        float base = widen(*(const KVOperand *)stage);
        bool coded = tile < full && base == base;
        const uint4 *exact_a = nullptr, *exact_b = nullptr;
        if (!coded) {
            /* Pages of the last tile past the prefix repeat its last page. */
            int last = pages - 1 - tile * GROUP_PAGES;
            const PageBounds bounds = cache.bounds(kv_head, tile, chunk_groups);
            exact_a = (const uint4 *)bounds.exact(min(g, last), 0) + t;
            exact_b = (const uint4 *)bounds.exact(min(g + 8, last), 0) + t;
        }
        float score[ROW_TILES][4] = {};
        unsigned next = pieces;
#pragma unroll 2
        for (int chunk = 0; chunk < CHUNKS; chunk++, next += row_tiles * WARP * 16) {
            int kind = chunk / LANE_PIECES, piece = chunk % LANE_PIECES * 4;
            uint4 a, b;
            if (coded) {
                const unsigned *code = codes + kind * (GROUP_PAGES * PAGE_STRIDE * 4) + piece;
                uint4 base = bases[piece], step = steps[piece];
                a = decode(code[0], base, step), b = decode(code[8 * PAGE_STRIDE * 4], base, step);
            } else {
                a = exact_a[kind * (HEAD_DIM / 8) + piece], b = exact_b[kind * (HEAD_DIM / 8) + piece];
            }
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                if (n >= row_tiles) break;
                uint4 row = load_shared_uint4(next + n * WARP * 16);
                mma(score[n], a.x, b.x, a.y, b.y, row.x, row.y);
                mma(score[n], a.z, b.z, a.w, b.w, row.z, row.w);
            }
        }
        int row = first_row + t * 2, page = tile * GROUP_PAGES + g;
        float *to = scores + ((size_t)head * rows + row) * stride + page;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++, row += SCORES_ROW_TILE, to += SCORES_ROW_TILE * stride) {
            if (n >= row_tiles) break;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (row + i % 2 < rows && page + i / 2 * 8 < pages) to[i % 2 * stride + i / 2 * 8] = score[n][i];
        }
        __syncwarp();
        copy(tile + STAGES * step, stage);
    }
}

/* page_scores.cu on tensor cores, for 16-bit bounds: a matmul of pages and rows over 2 * head_dim channels. A query is
 * two 16-bit values, the second being what rounding lost of the first, so that its dot product is as good as one of 16
 * (bfloat16) or 22 bits.
 *
 * Compiled with HEAD_DIM (64 or 128) and ROW_TILES, tiles of SCORES_ROW_TILE rows per thread block: up to 4, or 8. A
 * warp takes 16 pages at a time: their bounds go straight to registers, all in flight at once. Which channel is where
 * in the matmul does not matter as long as both sides agree: of each 32 channels, lane 4 g + t has the 8 from 8 t on,
 * 16 bytes, of pages g and g + 8. Rows are in shared memory in the order in which lanes read them.
 *
 * Grid: (kv_heads, splits, rows / (SCORES_ROW_TILE * ROW_TILES)). Must read the bounds, which it does once per z. */
static_assert(SCORES_THREADS == 256 && SCORES_ROW_TILE == 8, "8 warps; columns of a B fragment");
#define CHUNKS (2 * HEAD_DIM / 32)
#define BLOCKS_PER_SM (HEAD_DIM == 64 ? 2 : 0) /* 0: any; for 64 the compiler would aim at 3, and spill */
#define TILES_AT_ONCE (ROW_TILES < 4 ? ROW_TILES : 4)

/* Rows from first_row on as [CHUNKS][2 steps][ROW_TILES][lane]: pairs b0 and b1, then what rounding lost of them; zeros
 * where there is no query. Each thread has many loads in flight at once. */
__device__ __forceinline__ void prepare_rows(uint4 *row_pieces, const float *q, const int *tokens, int first_row,
                                             int rows, int kv_head, int group, int heads)
{
    constexpr int EACH = CHUNKS * 2 * ROW_TILES * WARP / SCORES_THREADS, BATCH = EACH < 8 ? EACH : 8;
    static_assert(EACH % BATCH == 0, "whole batches");
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int indices[(ROW_TILES + 3) / 4]; /* of rows lane, lane + 32 */
#pragma unroll
    for (int i = 0; i < (ROW_TILES + 3) / 4; i++)
        indices[i] = query_index(tokens, first_row + i * WARP + lane, rows, kv_head, group, heads);
#pragma unroll 1
    for (int first = 0; first < EACH; first += BATCH) {
        float4 fours[BATCH];
        bool exists[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int piece = warp + (first + i) * 8, tile = piece % ROW_TILES, step = piece / ROW_TILES;
            int channel = step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
            int at = __shfl_sync(~0u, indices[0], tile % 4 * 8 + lane / 4);
            if (ROW_TILES > 4) {
                int other = __shfl_sync(~0u, indices[(ROW_TILES - 1) / 4], tile % 4 * 8 + lane / 4);
                if (tile >= 4) at = other;
            }
            exists[i] = at >= 0;
            fours[i] = *(const float4 *)(q + (size_t)max(at, 0) * HEAD_DIM + channel % HEAD_DIM);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int piece = warp + (first + i) * 8;
            bool low = piece / ROW_TILES < CHUNKS; /* these channels meet the smallest keys */
            float x[4] = {fours[i].x, fours[i].y, fours[i].z, fours[i].w}, rest[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                x[j] = exists[i] ? x[j] : 0.0f;
                x[j] = low ? fminf(x[j], 0.0f) : fmaxf(x[j], 0.0f);
                rest[j] = x[j] - widen(narrow<KVValue>(x[j]));
            }
            row_pieces[piece * WARP + lane] =
                make_uint4(pack<KVValue>(x[0], x[1]), pack<KVValue>(x[2], x[3]), pack<KVValue>(rest[0], rest[1]),
                           pack<KVValue>(rest[2], rest[3]));
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

/* Volatile, to stay in its place among the mma: all pieces at once would not fit into registers. */
__device__ __forceinline__ uint4 load_piece(unsigned shared)
{
    uint4 piece;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "r"(shared)
                 : "memory");
    return piece;
}

extern "C" __global__ void __launch_bounds__(SCORES_THREADS, BLOCKS_PER_SM)
    page_scores_tensor(const float *q, const int *tokens, int rows, int heads, CacheView cache, float *scores,
                       int stride, unsigned *marks, int words)
{
    extern __shared__ uint4 row_pieces[];
    int kv_head = blockIdx.x, group = heads / cache.kv_heads, first_row = blockIdx.z * SCORES_ROW_TILE * ROW_TILES;
    int pages = cache.pages(*cache.length), chunk_pages = cache.chunk_pages();
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, tiles = (pages + 15) / 16;
    int tile = blockIdx.y * (SCORES_THREADS / WARP) + threadIdx.x / WARP, step = gridDim.y * (SCORES_THREADS / WARP);
    uint4 a[CHUNKS], b[CHUNKS];
    auto load = [&]() {
        if (tile >= tiles) return;
        /* Pages of the last tile past the prefix repeat its last page. */
        const uint4 *low = (const uint4 *)cache.bounds(kv_head, min(tile * 16 + g, pages - 1), chunk_pages);
        const uint4 *high = (const uint4 *)cache.bounds(kv_head, min(tile * 16 + g + 8, pages - 1), chunk_pages);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) a[c] = low[c * 4 + t], b[c] = high[c * 4 + t];
        /* Registers hold one tile; the next one comes into the L2 cache meanwhile, half a page per lane. */
        int ahead = (tile + step) * 16 + lane / 2;
        if (ahead >= pages) return;
        const KVValue *half = cache.bounds(kv_head, ahead, chunk_pages) + lane % 2 * HEAD_DIM;
#pragma unroll
        for (int line = 0; line < HEAD_DIM; line += 64) asm volatile("prefetch.global.L2 [%0];" : : "l"(half + line));
    };
    load(); /* the prefix was complete before the pass began */
    wait_for_previous();
    let_next_start();
    clear_marks(marks, words, kv_head);
    int row_tiles = used_tiles(tokens, rows, first_row, group);
    if (!row_tiles) return;
    prepare_rows(row_pieces, q, tokens, first_row, rows, kv_head, group, heads);
    __syncthreads();
    unsigned pieces = shared_address(row_pieces + lane);
    while (tile < tiles) {
        /* Some tiles of rows at a time: registers would not hold the sums of all. */
#pragma unroll 1
        for (int some = 0; some < row_tiles; some += TILES_AT_ONCE) {
            float score[TILES_AT_ONCE][4] = {};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                for (int n = 0; n < TILES_AT_ONCE; n++) {
                    if (some + n >= row_tiles) continue;
                    uint4 first = load_piece(pieces + (c * 2 * ROW_TILES + some + n) * WARP * 16);
                    uint4 second = load_piece(pieces + ((c * 2 + 1) * ROW_TILES + some + n) * WARP * 16);
                    mma(score[n], a[c].x, b[c].x, a[c].y, b[c].y, first.x, first.y);
                    mma(score[n], a[c].x, b[c].x, a[c].y, b[c].y, first.z, first.w);
                    mma(score[n], a[c].z, b[c].z, a[c].w, b[c].w, second.x, second.y);
                    mma(score[n], a[c].z, b[c].z, a[c].w, b[c].w, second.z, second.w);
                }
#pragma unroll
            for (int n = 0; n < TILES_AT_ONCE; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int row = first_row + (some + n) * 8 + t * 2 + i % 2, page = tile * 16 + g + i / 2 * 8;
                    if (row < rows && page < pages && some + n < row_tiles)
                        scores[((size_t)kv_head * rows + row) * stride + page] = score[n][i];
                }
        }
        tile += step;
        load();
    }
}

/* page_scores.cu on tensor cores, for 16-bit bounds: a product of pages and rows over 2 * head_dim channels.
 * A query is two 16-bit values, what rounding leaves being the second, which makes its product as good as
 * one of 16 (bfloat16) or 22 bits.
 *
 * Compiled with HEAD_DIM (64 or 128) and ROW_TILES, the rows of a thread block by 8: up to 4, or 8. A warp takes 16
 * pages at a time: their bounds go straight to registers, all under way at once. Which channel stands where in a
 * product does not matter as long as both sides agree: lane 4 g + t has of each 32 channels the 8 from 8 t on,
 * 16 bytes, of pages g and g + 8. Rows are in shared memory as the lanes want them.
 *
 * Grid: (kv_heads, splits, rows / (8 * ROW_TILES)), 256 threads. Moves the bounds in, once in each z. Rows of a
 * negative token get 0. */
#define CHUNKS (2 * HEAD_DIM / 32)
#if HEAD_DIM == 64
#define BLOCKS , 2 /* a processor; left alone, the compiler goes for 3, and spills */
#else
#define BLOCKS
#endif
#define AT_ONCE (ROW_TILES < 4 ? ROW_TILES : 4)

/* Row r's place among rows [tokens, heads] of q: of token tokens[r / group], null: r / group; -1 for a negative token,
 * and beyond the last row. */
__device__ __forceinline__ int query_row(const int *tokens, int row, int rows, int kv_head, int group, int heads)
{
    int token = row >= rows ? -1 : tokens ? tokens[row / group] : row / group;
    return token < 0 ? -1 : token * heads + kv_head * group + row % group;
}

/* Rows first_row on as [CHUNKS][2 steps][ROW_TILES][lane]: pairs b0, b1, then their rests; zeros where there is no
 * query. By 256 threads, each of which has many loads under way at once. */
__device__ __forceinline__ void prepare_rows(uint4 *row_pieces, const float *q, const int *tokens, int first_row,
                                             int rows, int kv_head, int group, int heads)
{
    constexpr int EACH = CHUNKS * 2 * ROW_TILES * WARP / 256, BATCH = EACH < 8 ? EACH : 8;
    static_assert(EACH % BATCH == 0, "whole batches");
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int places[(ROW_TILES + 3) / 4]; /* of rows lane, lane + 32 */
#pragma unroll
    for (int i = 0; i < (ROW_TILES + 3) / 4; i++)
        places[i] = query_row(tokens, first_row + i * WARP + lane, rows, kv_head, group, heads);
#pragma unroll 1
    for (int first = 0; first < EACH; first += BATCH) {
        float4 fours[BATCH];
        bool there[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int piece = warp + (first + i) * 8, tile = piece % ROW_TILES, step = piece / ROW_TILES;
            int channel = step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
            int at = __shfl_sync(~0u, places[0], tile % 4 * 8 + lane / 4);
            if (ROW_TILES > 4) {
                int other = __shfl_sync(~0u, places[(ROW_TILES - 1) / 4], tile % 4 * 8 + lane / 4);
                if (tile >= 4) at = other;
            }
            there[i] = at >= 0;
            fours[i] = *(const float4 *)(q + (size_t)max(at, 0) * HEAD_DIM + channel % HEAD_DIM);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int piece = warp + (first + i) * 8;
            bool low = piece / ROW_TILES < CHUNKS; /* these channels meet the smallest keys */
            float x[4] = {fours[i].x, fours[i].y, fours[i].z, fours[i].w}, rest[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                x[j] = there[i] ? x[j] : 0.0f;
                x[j] = low ? fminf(x[j], 0.0f) : fmaxf(x[j], 0.0f);
                rest[j] = x[j] - widen(narrow(x[j]));
            }
            row_pieces[piece * WARP + lane] =
                make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(rest[0], rest[1]), pack(rest[2], rest[3]));
        }
    }
}

/* In its place among the products: all at once they would not fit into registers. */
__device__ __forceinline__ uint4 load_piece(unsigned shared)
{
    uint4 piece;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "r"(shared)
                 : "memory");
    return piece;
}

extern "C" __global__ void __launch_bounds__(256 BLOCKS)
    page_scores_tensor(const float *q, const int *tokens, int rows, int heads, BOUNDS_PARAMETERS, float *scores,
                       int stride, unsigned *marks, int words)
{
    extern __shared__ uint4 row_pieces[];
    BoundsView bounds = BOUNDS_VIEW;
    int kv_head = blockIdx.x, group = heads / bounds.kv_heads, first_row = blockIdx.z * 8 * ROW_TILES;
    int pages = (*cache_length + page_size - 1) / page_size;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, tiles = (pages + 15) / 16;
    int tile = blockIdx.y * (256 / WARP) + threadIdx.x / WARP, step = gridDim.y * (256 / WARP);
    uint4 a[CHUNKS], b[CHUNKS];
    auto load = [&]() {
        if (tile >= tiles) return;
        /* The last tile's pages beyond the prefix's are taken for its last one. */
        const uint4 *low = (const uint4 *)bounds.page(kv_head, min(tile * 16 + g, pages - 1));
        const uint4 *high = (const uint4 *)bounds.page(kv_head, min(tile * 16 + g + 8, pages - 1));
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) a[c] = low[c * 4 + t], b[c] = high[c * 4 + t];
        /* Registers hold one tile; the memory works on the next one meanwhile. Half a page is of each lane. */
        int ahead = (tile + step) * 16 + lane / 2;
        if (ahead >= pages) return;
        const Held *half = bounds.page(kv_head, ahead) + lane % 2 * HEAD_DIM;
#pragma unroll
        for (int line = 0; line < HEAD_DIM; line += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(half + line));
    };
    load(); /* the prefix was there before the pass began */
    wait_for_previous();
    let_next_start();
    clear_marks(marks, words, kv_head);
    prepare_rows(row_pieces, q, tokens, first_row, rows, kv_head, group, heads);
    __syncthreads();
    unsigned pieces = shared_address(row_pieces + lane);
    while (tile < tiles) {
        /* Some rows at a time, or registers would not hold their sums. */
#pragma unroll 1
        for (int some = 0; some < ROW_TILES; some += AT_ONCE) {
            float score[AT_ONCE][4] = {};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                for (int n = 0; n < AT_ONCE; n++) {
                    uint4 first = load_piece(pieces + (c * 2 * ROW_TILES + some + n) * WARP * 16);
                    uint4 second = load_piece(pieces + ((c * 2 + 1) * ROW_TILES + some + n) * WARP * 16);
                    mma(score[n], a[c].x, b[c].x, a[c].y, b[c].y, first.x, first.y);
                    mma(score[n], a[c].x, b[c].x, a[c].y, b[c].y, first.z, first.w);
                    mma(score[n], a[c].z, b[c].z, a[c].w, b[c].w, second.x, second.y);
                    mma(score[n], a[c].z, b[c].z, a[c].w, b[c].w, second.z, second.w);
                }
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int row = first_row + (some + n) * 8 + t * 2 + i % 2, page = tile * 16 + g + i / 2 * 8;
                    if (row < rows && page < pages)
                        scores[((size_t)kv_head * rows + row) * stride + page] = score[n][i];
                }
        }
        tile += step;
        load();
    }
}

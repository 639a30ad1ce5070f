/* Attention of query rows over the cache on tensor cores, by the online softmax, for compute capability
 * 8.0 and later.
 *
 * A thread block has ROW_WARPS * KEY_WARPS warps: a warp has 16 query rows (token, head of the group)
 * and of each tile of TILE positions its KEY_WARPS-th. Tiles go through STAGES buffers of shared memory
 * by asynchronous copies, in the cache's layout (cache.cuh), so that ldmatrix meets no bank twice. All
 * query heads of a kv head share every load.
 *
 * Compiled with HEAD_DIM (a multiple of 64), ROW_WARPS, KEY_WARPS and STAGES. */
#define TILE 64
static_assert(STAGES >= 2, "a tile is computed while the next one comes");
#define PIECES (HEAD_DIM / 8) /* of 16 bytes in a row */
#define WARP_KEYS (TILE / KEY_WARPS)
#define THREADS (WARP * ROW_WARPS * KEY_WARPS)
#define TILE_BYTES (TILE * HEAD_DIM * 2)
#define BLOCK_ROWS (16 * ROW_WARPS)

struct TensorRows {
    unsigned query[HEAD_DIM / 16][4]; /* A fragments, scaled so that exp2 of a score is wanted */
    float sum[HEAD_DIM / 8][4], top[2], total[2]; /* of rows g and g + 8 of the warp, lane = 4 g + t */
    int row[2], limit[2];                         /* its rows, and the positions that they see */
};

/* Shared address of 16 bytes of a tile. */
__device__ __forceinline__ unsigned place(unsigned tile, int row, int piece)
{
    return tile + row / 8 * (HEAD_DIM * 16) + piece / 8 * 1024 + row % 8 * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

/* With `tokens`, row r is of token tokens[r / group]; where that is negative, of any. */
__device__ __forceinline__ void load_queries(TensorRows &state, const float *q, const int *tokens, int first_row,
                                             int rows, int kv_head, int group, int heads)
{
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float scale = rsqrtf((float)HEAD_DIM) * 1.44269504f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first_row + threadIdx.x / WARP / KEY_WARPS * 16 + g + half * 8, there = min(row, rows - 1);
        state.row[half] = row;
        state.top[half] = -INFINITE;
        state.total[half] = 0;
        int token = tokens ? max(tokens[there / group], 0) : there / group;
        const float *from = q + ((size_t)token * heads + kv_head * group + there % group) * HEAD_DIM;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            float2 low = *(const float2 *)(from + k * 16 + t * 2), high = *(const float2 *)(from + k * 16 + 8 + t * 2);
            state.query[k][half] = pack(low.x * scale, low.y * scale);
            state.query[k][half + 2] = pack(high.x * scale, high.y * scale);
        }
    }
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) state.sum[d][i] = 0;
}

/* Scores of the warp's rows and its keys of a tile. */
__device__ __forceinline__ void scores_of_tile(float (&score)[WARP_KEYS / 8][4], const TensorRows &state, unsigned keys)
{
    int key_warp = threadIdx.x / WARP % KEY_WARPS, lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 32; k++)
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; n++) {
            unsigned b[4]; /* 8 keys, 32 channels */
            load_matrices(b, place(keys, key_warp * WARP_KEYS + n * 8 + lane % 8, k * 4 + lane / 8));
            const unsigned(&low)[4] = state.query[2 * k], (&high)[4] = state.query[2 * k + 1];
            mma(score[n], low[0], low[1], low[2], low[3], b[0], b[1]);
            mma(score[n], high[0], high[1], high[2], high[3], b[2], b[3]);
        }
}

/* From the cache to shared memory: pieces of 16 bytes of a tile's keys and values. */
__device__ __forceinline__ void load_tile(unsigned to, const CacheView &cache, Whole, int kv_head, int tile, int)
{
    const Held *keys = cache.group(0, kv_head, tile * TILE), *values = cache.group(1, kv_head, tile * TILE);
#pragma unroll
    for (int i = threadIdx.x; i < TILE * PIECES; i += THREADS) {
        copy_16_bytes_async(to + i * 16, keys + i * 8);
        copy_16_bytes_async(to + TILE_BYTES + i * 16, values + i * 8);
    }
}

/* Places from `end` on are in no page: zeros. */
__device__ __forceinline__ void load_tile(unsigned to, const CacheView &cache, const Listed &where, int kv_head,
                                          int tile, int end)
{
#pragma unroll
    for (int i = threadIdx.x; i < TILE * PIECES; i += THREADS) {
        int place = tile * TILE + i / HEAD_DIM * 8, piece = i % HEAD_DIM * 8;
        bool there = place < end;
        int position = where(there ? place : tile * TILE);
        copy_or_zero_16_bytes_async(to + i * 16, cache.group(0, kv_head, position) + piece, there);
        copy_or_zero_16_bytes_async(to + TILE_BYTES + i * 16, cache.group(1, kv_head, position) + piece, there);
    }
}

/* Tiles first <= tile < last of the places that `where` has; only in those from `ragged` on is a place hidden from
 * a row. The state's limits are there; its queries when `load_queries` has been called, while the first tiles are on
 * their way. */
template <class Where, class Load>
__device__ __forceinline__ void attend(TensorRows &state, const CacheView &cache, const Where &where, int kv_head,
                                       int first, int last, int ragged, unsigned shared, const Load &load_queries)
{
    int key_warp = threadIdx.x / WARP % KEY_WARPS, lane = threadIdx.x % WARP, t = lane % 4;
    auto load = [&](int tile) {
        load_tile(shared + (tile - first) % STAGES * (2 * TILE_BYTES), cache, where, kv_head, tile, state.limit[0]);
    };
    for (int s = 0; s < STAGES - 1; s++) {
        if (first + s < last) load(first + s);
        commit_copies();
    }
    load_queries();
    for (int tile = first; tile < last; tile++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (tile + STAGES - 1 < last) load(tile + STAGES - 1);
        commit_copies();

        unsigned keys = shared + (tile - first) % STAGES * (2 * TILE_BYTES), values = keys + TILE_BYTES;
        float score[WARP_KEYS / 8][4] = {};
        scores_of_tile(score, state, keys);

        if (tile >= ragged)
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (tile * TILE + key_warp * WARP_KEYS + n * 8 + t * 2 + i % 2 >= state.limit[i / 2])
                        score[n][i] = -INFINITE;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = state.top[half];
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++)
                highest = fmaxf(highest, fmaxf(score[n][half * 2], score[n][half * 2 + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            /* Before the first key the maximum is -inf, and nothing is scaled. */
            float factor = highest == -INFINITE ? 1.0f : exp2f(state.top[half] - highest);
            float base = highest == -INFINITE ? 0.0f : highest;
            state.top[half] = highest;
            float part_total = 0;
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float p = exp2f(score[n][half * 2 + i] - base);
                    score[n][half * 2 + i] = p;
                    part_total += p;
                }
            state.total[half] = state.total[half] * factor + part_total;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++) {
                state.sum[d][half * 2] *= factor;
                state.sum[d][half * 2 + 1] *= factor;
            }
        }

#pragma unroll
        for (int k = 0; k < WARP_KEYS / 16; k++) {
            unsigned p[4] = {pack(score[2 * k][0], score[2 * k][1]), pack(score[2 * k][2], score[2 * k][3]),
                             pack(score[2 * k + 1][0], score[2 * k + 1][1]),
                             pack(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; d++) {
                unsigned b[4]; /* 16 keys, 16 channels */
                int key = key_warp * WARP_KEYS + k * 16 + lane % 16;
                load_matrices_transposed(b, place(values, key, d * 2 + lane / 16));
                mma(state.sum[2 * d], p[0], p[1], p[2], p[3], b[0], b[1]);
                mma(state.sum[2 * d + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        state.total[half] += __shfl_xor_sync(~0u, state.total[half], 1);
        state.total[half] += __shfl_xor_sync(~0u, state.total[half], 2);
    }
}

#define SUM_STRIDE (HEAD_DIM + 8) /* of a row of sums: rows of a warp do not meet in banks */
#define SLOT_FLOATS (16 * SUM_STRIDE + 2 * 16) /* a warp's sums, tops and totals */

/* This block's rows of one part, its key warps' added up: unnormalised o [parts, tokens, heads, head_dim], maximum and
 * sum [parts, tokens, heads]. Where the tiles were, each warp leaves its sums. */
__device__ __forceinline__ void write_part(const TensorRows &state, float *shared, int part, int first_row, int rows,
                                           int tokens, int kv_head, int group, int heads, float *o, float *tops,
                                           float *totals)
{
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    float *sums = shared + threadIdx.x / WARP * SLOT_FLOATS;
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + half * 8;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
            *(float2 *)(sums + row * SUM_STRIDE + d * 8 + t * 2) =
                make_float2(state.sum[d][half * 2], state.sum[d][half * 2 + 1]);
        if (t == 0) {
            sums[16 * SUM_STRIDE + row] = state.top[half];
            sums[16 * SUM_STRIDE + 16 + row] = state.total[half];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_ROWS * (HEAD_DIM / 4); i += THREADS) {
        int row = i / (HEAD_DIM / 4), channel = i % (HEAD_DIM / 4) * 4, place = row % 16;
        if (first_row + row >= rows) break;
        const float *slots = shared + row / 16 * KEY_WARPS * SLOT_FLOATS;
        float top = -INFINITE, total = 0;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int s = 0; s < KEY_WARPS; s++) top = fmaxf(top, slots[s * SLOT_FLOATS + 16 * SUM_STRIDE + place]);
        float base = top == -INFINITE ? 0.0f : top;
#pragma unroll
        for (int s = 0; s < KEY_WARPS; s++) {
            const float *slot = slots + s * SLOT_FLOATS;
            float factor = exp2f(slot[16 * SUM_STRIDE + place] - base);
            float4 more = *(const float4 *)(slot + place * SUM_STRIDE + channel);
            total += slot[16 * SUM_STRIDE + 16 + place] * factor;
            sum.x += more.x * factor, sum.y += more.y * factor, sum.z += more.z * factor, sum.w += more.w * factor;
        }
        row += first_row;
        size_t at = ((size_t)part * tokens + row / group) * heads + kv_head * group + row % group;
        *(float4 *)(o + at * HEAD_DIM + channel) = sum;
        if (channel == 0) {
            tops[at] = top * 0.69314718f; /* of the natural exponential */
            totals[at] = total;
        }
    }
}

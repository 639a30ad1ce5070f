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

__device__ __forceinline__ void load_queries(TensorRows &state, const float *q, int first_row, int rows,
                                             int kv_head, int group, int heads)
{
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float scale = rsqrtf((float)HEAD_DIM) * 1.44269504f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first_row + threadIdx.x / WARP / KEY_WARPS * 16 + g + half * 8, there = min(row, rows - 1);
        state.row[half] = row;
        state.top[half] = -INFINITE;
        state.total[half] = 0;
        const float *from = q + ((size_t)(there / group) * heads + kv_head * group + there % group) * HEAD_DIM;
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

/* Tiles first <= tile < last; only in those from `ragged` on is a position hidden from a row. */
__device__ __forceinline__ void attend(TensorRows &state, const CacheView &cache, int kv_head, int first, int last,
                                       int ragged, unsigned shared)
{
    int key_warp = threadIdx.x / WARP % KEY_WARPS, lane = threadIdx.x % WARP, t = lane % 4;
    auto load_tile = [&](int tile) {
        const Held *keys = cache.group(0, kv_head, tile * TILE), *values = cache.group(1, kv_head, tile * TILE);
        unsigned to = shared + (tile - first) % STAGES * (2 * TILE_BYTES);
#pragma unroll
        for (int i = threadIdx.x; i < TILE * PIECES; i += THREADS) {
            copy_16_bytes_async(to + i * 16, keys + i * 8);
            copy_16_bytes_async(to + TILE_BYTES + i * 16, values + i * 8);
        }
    };
    for (int s = 0; s < STAGES - 1; s++) {
        if (first + s < last) load_tile(first + s);
        commit_copies();
    }
    for (int tile = first; tile < last; tile++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (tile + STAGES - 1 < last) load_tile(tile + STAGES - 1);
        commit_copies();

        unsigned keys = shared + (tile - first) % STAGES * (2 * TILE_BYTES), values = keys + TILE_BYTES;
        float score[WARP_KEYS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; k++)
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++) {
                unsigned b[4]; /* 8 keys, 32 channels */
                load_matrices(b, place(keys, key_warp * WARP_KEYS + n * 8 + lane % 8, k * 4 + lane / 8));
                unsigned(&low)[4] = state.query[2 * k], (&high)[4] = state.query[2 * k + 1];
                mma(score[n], low[0], low[1], low[2], low[3], b[0], b[1]);
                mma(score[n], high[0], high[1], high[2], high[3], b[2], b[3]);
            }

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

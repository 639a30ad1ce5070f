/* Attention of a block's queries over the paged prefix on tensor cores, split over the prefix; parts
 * as those of prefix_attention.cu, merged by its merge_parts.
 *
 * A block has ROW_WARPS * KEY_WARPS warps: a warp has 16 query rows (token, head of the group) and of
 * each tile of 64 positions its KEY_WARPS-th. Tiles go through `stages` buffers of shared memory by
 * asynchronous copies; rows of 16 bytes are swizzled so that ldmatrix meets no bank twice. Since all
 * rows of a kv head are in one block, every key and value is read once.
 *
 * Compiled with HEAD_DIM (a multiple of 64), ROW_WARPS and KEY_WARPS. Grid: (kv_heads, splits,
 * rows / (16 * ROW_WARPS)). Must move 2 * kv_heads * length * head_dim values. */
#define TILE 64
#define STAGES 3 /* at the least; the host may give more shared memory */
#define CHUNKS (HEAD_DIM / 8) /* of 16 bytes in a row */
#define WARP_KEYS (TILE / KEY_WARPS)
#define THREADS (WARP * ROW_WARPS * KEY_WARPS)

/* Shared address of 16 bytes of a tile [TILE][HEAD_DIM]. */
__device__ __forceinline__ unsigned place(unsigned tile, int row, int chunk)
{
    return tile + (row * CHUNKS + (chunk ^ (row & 7))) * 16;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    prefix_attention_tensor(const float *q, CACHE_PARAMETERS, float *o, float *tops, float *totals, int tokens,
                            int heads, int stages)
{
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const int tile_bytes = TILE * HEAD_DIM * 2, stage_bytes = 2 * tile_bytes;
    unsigned shared = shared_address(shared_bytes);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int row_warp = warp / KEY_WARPS, key_warp = warp % KEY_WARPS;
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int rows = tokens * group, length = *cache.length, tiles = (length + TILE - 1) / TILE;
    int first = (int)((long long)tiles * part / parts), last = (int)((long long)tiles * (part + 1) / parts);

    auto load_tile = [&](int tile, int stage) {
        /* Chunks of the cache are whole tiles. */
        const Held *keys = cache.row(0, kv_head, tile * TILE), *values = cache.row(1, kv_head, tile * TILE);
        unsigned to = shared + stage * stage_bytes;
#pragma unroll
        for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            copy_16_bytes_async(place(to, row, chunk), keys + i * 8);
            copy_16_bytes_async(place(to + tile_bytes, row, chunk), values + i * 8);
        }
    };
    for (int s = 0; s < stages - 1; s++) {
        if (first + s < last) load_tile(first + s, s);
        commit_copies();
    }

    /* Queries as A fragments, scaled so that exp2 of a score is what is wanted. */
    float scale = rsqrtf((float)HEAD_DIM) * 1.44269504f;
    unsigned query[HEAD_DIM / 16][4];
    int row_of_lane[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = (blockIdx.z * ROW_WARPS + row_warp) * 16 + g + half * 8;
        row_of_lane[half] = row;
        const float *from =
            q + ((size_t)(min(row, rows - 1) / group) * heads + kv_head * group + min(row, rows - 1) % group) * HEAD_DIM;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            float2 low = *(const float2 *)(from + k * 16 + t * 2), high = *(const float2 *)(from + k * 16 + 8 + t * 2);
            query[k][half] = pack(low.x * scale, low.y * scale);
            query[k][half + 2] = pack(high.x * scale, high.y * scale);
        }
    }

    float sum[HEAD_DIM / 8][4] = {}, top[2] = {-INFINITE, -INFINITE}, total[2] = {};
    for (int tile = first; tile < last; tile++) {
        int stage = (tile - first) % stages;
        /* The newest stages - 2 groups may be under way: with a variable number of stages the
         * count for the instruction is chosen here. */
        if (stages == 3) wait_copies<1>();
        else if (stages == 4) wait_copies<2>();
        else if (stages == 5) wait_copies<3>();
        else wait_copies<4>();
        __syncthreads();
        if (tile + stages - 1 < last) load_tile(tile + stages - 1, (tile - first + stages - 1) % stages);
        commit_copies();

        unsigned keys = shared + stage * stage_bytes, values = keys + tile_bytes;
        float score[WARP_KEYS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; k++)
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++) {
                unsigned b[4]; /* 8 keys, 32 channels */
                load_matrices(b, place(keys, key_warp * WARP_KEYS + n * 8 + lane % 8, k * 4 + lane / 8));
                mma(score[n], query[2 * k][0], query[2 * k][1], query[2 * k][2], query[2 * k][3], b[0], b[1]);
                mma(score[n], query[2 * k + 1][0], query[2 * k + 1][1], query[2 * k + 1][2], query[2 * k + 1][3],
                    b[2], b[3]);
            }

        int first_key = tile * TILE + key_warp * WARP_KEYS;
        if (first_key + WARP_KEYS > length)
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (first_key + n * 8 + t * 2 + i % 2 >= length) score[n][i] = -INFINITE;

#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = top[half];
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++)
                highest = fmaxf(highest, fmaxf(score[n][half * 2], score[n][half * 2 + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            /* Before the first key the maximum is -inf, and nothing is scaled. */
            float factor = highest == -INFINITE ? 1.0f : exp2f(top[half] - highest);
            float base = highest == -INFINITE ? 0.0f : highest;
            top[half] = highest;
            float part_total = 0;
#pragma unroll
            for (int n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float p = exp2f(score[n][half * 2 + i] - base);
                    score[n][half * 2 + i] = p;
                    part_total += p;
                }
            total[half] = total[half] * factor + part_total;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++) {
                sum[d][half * 2] *= factor;
                sum[d][half * 2 + 1] *= factor;
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
                mma(sum[2 * d], p[0], p[1], p[2], p[3], b[0], b[1]);
                mma(sum[2 * d + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] += __shfl_xor_sync(~0u, total[half], 1);
        total[half] += __shfl_xor_sync(~0u, total[half], 2);
    }

    /* Each key warp is a part of its own: KEY_WARPS parts a block. */
    size_t at_part = (size_t)(part * KEY_WARPS + key_warp) * tokens;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = row_of_lane[half];
        if (row >= rows) continue;
        size_t at = (at_part + row / group) * heads + kv_head * group + row % group;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
            *(float2 *)(o + at * HEAD_DIM + d * 8 + t * 2) = make_float2(sum[d][half * 2], sum[d][half * 2 + 1]);
        if (t == 0) {
            tops[at] = top[half] == -INFINITE ? -INFINITE : top[half] * 0.69314718f;
            totals[at] = total[half];
        }
    }
}

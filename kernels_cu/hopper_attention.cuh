/* Attention of query rows over the cache by a warpgroup's products, for compute capability 9.0.
 *
 * A thread block has two warpgroups that compute, ROW_GROUPS * KEY_GROUPS = 2, and COPY_THREADS more: a warp
 * that copies, or a warpgroup that copies and leaves its registers to the others. A warpgroup has 64 query rows (token, head of the group) and every KEY_GROUPS-th tile of TILE positions.
 * Tiles go through STAGES buffers of shared memory by bulk copies: the cache's layout (cache.cuh) is the
 * one that products read. All query heads of a kv head share every load.
 *
 * Compiled with HEAD_DIM (64 or 128), TILE (64 or 128), ROW_GROUPS, KEY_GROUPS, COPY_THREADS and STAGES. */
#define GROUP 128 /* threads of a warpgroup */
#define COMPUTE_THREADS (GROUP * ROW_GROUPS * KEY_GROUPS)
#define THREADS (COMPUTE_THREADS + COPY_THREADS)
#define BLOCK_ROWS (64 * ROW_GROUPS)
#define EIGHT_ROWS (HEAD_DIM * 16) /* bytes */
#define TILE_BYTES (TILE * HEAD_DIM * 2)
#define QUERY_BYTES (BLOCK_ROWS * HEAD_DIM * 2)

/* Shared memory: STAGES times keys and values, the queries, two barriers a stage. */
struct Stages {
    unsigned base;
    __device__ __forceinline__ unsigned keys(int stage) const { return base + stage * 2 * TILE_BYTES; }
    __device__ __forceinline__ unsigned values(int stage) const { return keys(stage) + TILE_BYTES; }
    __device__ __forceinline__ unsigned queries() const { return base + STAGES * 2 * TILE_BYTES; }
    __device__ __forceinline__ unsigned full(int stage) const { return queries() + QUERY_BYTES + stage * 16; }
    __device__ __forceinline__ unsigned empty(int stage) const { return full(stage) + 8; }
};

struct HopperRows {
    float sum[HEAD_DIM / 2], top[2], total[2]; /* of rows g and g + 8 of the warp, lane = 4 g + t */
    int row[2], limit[2];                      /* its rows, and the positions that they see */
};

/* By all threads of the block, before anything else. */
__device__ __forceinline__ void prepare(const Stages &stages)
{
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(stages.full(s), 1);
            barrier_init(stages.empty(s), ROW_GROUPS);
        }
        fence_async();
    }
    __syncthreads();
}

/* By the threads that copy: tiles first <= tile < last, each as soon as its stage is free. */
__device__ __forceinline__ void copy_tiles(const Stages &stages, const CacheView &cache, int kv_head, int first, int last)
{
    if (COPY_THREADS == GROUP) set_registers_down<24>();
    for (int i = 0; i < last - first && threadIdx.x == COMPUTE_THREADS; i++) {
        int stage = i % STAGES, position = (first + i) * TILE;
        if (i >= STAGES) barrier_wait(stages.empty(stage), (i / STAGES - 1) & 1);
        barrier_arrive_expecting(stages.full(stage), 2 * TILE_BYTES);
        bulk_copy(stages.keys(stage), cache.group(0, kv_head, position), TILE_BYTES, stages.full(stage));
        bulk_copy(stages.values(stage), cache.group(1, kv_head, position), TILE_BYTES, stages.full(stage));
    }
}

/* By all warps that compute: the block's queries into shared memory, scaled so that exp2 of a score is wanted. */
__device__ __forceinline__ void load_queries(HopperRows &state, const Stages &stages, const float *q, int first_row,
                                             int rows, int kv_head, int group, int heads)
{
    if (COPY_THREADS == GROUP) set_registers_up<240>();
    float scale = rsqrtf((float)HEAD_DIM) * 1.44269504f;
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK_ROWS * (HEAD_DIM / 8); i += COMPUTE_THREADS) {
        int r = i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8), row = first_row + r;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (row < rows) {
            const float4 *from = (const float4 *)(q + ((size_t)(row / group) * heads + kv_head * group + row % group) *
                                                          HEAD_DIM + piece * 8);
            float4 low = from[0], high = from[1];
            packed = make_uint4(pack(low.x * scale, low.y * scale), pack(low.z * scale, low.w * scale),
                                pack(high.x * scale, high.y * scale), pack(high.z * scale, high.w * scale));
        }
        unsigned to = stages.queries() + r / 8 * EIGHT_ROWS + piece / 8 * 1024 + r % 8 * 128 + ((piece % 8) ^ (r % 8)) * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(packed.x), "r"(packed.y), "r"(packed.z),
                     "r"(packed.w) : "memory");
    }
    fence_async();
    named_barrier(1, COMPUTE_THREADS);
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        state.row[half] = first_row + warp / 4 / KEY_GROUPS * 64 + warp % 4 * 16 + g + half * 8;
        state.top[half] = -INFINITE;
        state.total[half] = 0;
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) state.sum[i] = 0;
}

/* By all warps that compute. Only in tiles from `ragged` on is a position hidden from a row. */
__device__ __forceinline__ void attend(HopperRows &state, const Stages &stages, int first, int last, int ragged)
{
    int warpgroup = threadIdx.x / GROUP, key_group = warpgroup % KEY_GROUPS, t = threadIdx.x % 4;
    unsigned queries = stages.queries() + warpgroup / KEY_GROUPS * 8 * EIGHT_ROWS;
    for (int i = key_group; i < last - first; i += KEY_GROUPS) {
        int stage = i % STAGES;
        barrier_wait(stages.full(stage), i / STAGES & 1);
        float score[TILE / 2];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            int at = k / 4 * 1024 + k % 4 * 32;
            wgmma(score, descriptor(queries + at, EIGHT_ROWS, 0), descriptor(stages.keys(stage) + at, EIGHT_ROWS, 0),
                  k == 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(score);

        if (first + i >= ragged)
#pragma unroll
            for (int n = 0; n < TILE / 2; n++)
                if ((first + i) * TILE + n / 4 * 8 + t * 2 + n % 2 >= state.limit[n % 4 / 2]) score[n] = -INFINITE;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = state.top[half];
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
                highest = fmaxf(highest, fmaxf(score[n * 4 + half * 2], score[n * 4 + half * 2 + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            /* Before the first key the maximum is -inf, and nothing is scaled. */
            float factor = highest == -INFINITE ? 1.0f : exp2f(state.top[half] - highest);
            float base = highest == -INFINITE ? 0.0f : highest, total = 0;
            state.top[half] = highest;
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float p = exp2f(score[n * 4 + half * 2 + j] - base);
                    score[n * 4 + half * 2 + j] = p;
                    total += p;
                }
            state.total[half] = state.total[half] * factor + total;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++) {
                state.sum[d * 4 + half * 2] *= factor;
                state.sum[d * 4 + half * 2 + 1] *= factor;
            }
        }

        unsigned p[TILE / 16][4];
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) p[k][j] = pack(score[k * 8 + j * 2], score[k * 8 + j * 2 + 1]);
        pin(state.sum);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
            wgmma(state.sum, p[k], descriptor(stages.values(stage) + k * 2 * EIGHT_ROWS, EIGHT_ROWS, 1024));
        wgmma_commit();
        wgmma_wait<0>();
        pin(state.sum);
        if (threadIdx.x % GROUP == 0) barrier_arrive(stages.empty(stage));
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        state.total[half] += __shfl_xor_sync(~0u, state.total[half], 1);
        state.total[half] += __shfl_xor_sync(~0u, state.total[half], 2);
    }
}

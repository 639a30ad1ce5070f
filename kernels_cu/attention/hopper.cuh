/* Attention of query rows over the cache by wgmma, for compute capability 9.0.
 *
 * A thread block has two compute warpgroups, ROW_GROUPS * KEY_GROUPS = 2, and COPY_THREADS more: a warp that copies, or
 * a warpgroup that copies and gives its registers to the others. A warpgroup has 64 query rows, and every KEY_GROUPS-th
 * tile of TILE positions. Tiles go through STAGES buffers of shared memory by bulk copies: the cache's layout is the
 * one that wgmma reads. All query heads of a kv head share every load.
 *
 * Compiled with HEAD_DIM (64 or 128), TILE (64 or 128), ROW_GROUPS, KEY_GROUPS, COPY_THREADS and STAGES. */
#define COMPUTE_THREADS (WARPGROUP * ROW_GROUPS * KEY_GROUPS)
#define THREADS (COMPUTE_THREADS + COPY_THREADS)
#define BLOCK_ROWS (HOPPER_ROWS * ROW_GROUPS)
#define EIGHT_ROWS (HEAD_DIM * 16) /* bytes */
#define TILE_BYTES (TILE * HEAD_DIM * 2)
#define QUERY_BYTES (BLOCK_ROWS * HEAD_DIM * 2)
static_assert(COMPUTE_THREADS == HOPPER_COMPUTE_THREADS && HOPPER_ROWS == 64, "two warpgroups of 64 rows");

/* Shared memory: STAGES times keys and values, the queries, two barriers per stage. */
struct Stages {
    unsigned base;
    __device__ __forceinline__ unsigned keys(int stage) const { return base + stage * 2 * TILE_BYTES; }
    __device__ __forceinline__ unsigned values(int stage) const { return keys(stage) + TILE_BYTES; }
    __device__ __forceinline__ unsigned queries() const { return base + STAGES * 2 * TILE_BYTES; }
    __device__ __forceinline__ Ring ring() const { return {queries() + QUERY_BYTES}; }
};

/* Called by all threads of the block, first. */
__device__ __forceinline__ void prepare(const Stages &stages)
{
    if (threadIdx.x == 0) {
        stages.ring().initialize(ROW_GROUPS);
        fence_async();
    }
    __syncthreads();
}

/* Called by the threads that copy: tiles first <= tile < last, each as soon as its stage is free. */
__device__ __forceinline__ void copy_tiles(const Stages &stages, const CacheView &cache, int kv_head, int first,
                                           int last)
{
    if (COPY_THREADS == WARPGROUP) set_registers_down<24>();
    for (int i = 0; i < last - first && threadIdx.x == COMPUTE_THREADS; i++) {
        int stage = i % STAGES, position = (first + i) * TILE;
        stages.ring().wait_until_empty(i);
        unsigned full = stages.ring().full(stage);
        barrier_arrive_expecting(full, 2 * TILE_BYTES);
        bulk_copy(stages.keys(stage), cache.group(CACHED_KEYS, kv_head, position), TILE_BYTES, full);
        bulk_copy(stages.values(stage), cache.group(CACHED_VALUES, kv_head, position), TILE_BYTES, full);
    }
}

/* Called by all compute warps: the block's scaled queries into shared memory. */
__device__ __forceinline__ void load_queries(FragmentRows &state, const Stages &stages, const float *q,
                                             const QueryRows &rows)
{
    if (COPY_THREADS == WARPGROUP) set_registers_up<240>();
    float scale = QUERY_SCALE;
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK_ROWS * (HEAD_DIM / 8); i += COMPUTE_THREADS) {
        int r = i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8), row = rows.first + r;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (row < rows.count) {
            const float4 *from = (const float4 *)(q + rows.index(row) * HEAD_DIM + piece * 8);
            float4 low = from[0], high = from[1];
            packed = make_uint4(
                pack<KVValue>(low.x * scale, low.y * scale), pack<KVValue>(low.z * scale, low.w * scale),
                pack<KVValue>(high.x * scale, high.y * scale), pack<KVValue>(high.z * scale, high.w * scale));
        }
        unsigned to = stages.queries() + r / 8 * EIGHT_ROWS + piece / 8 * 1024 + r % 8 * 128;
        to += ((piece % 8) ^ (r % 8)) * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                     :
                     : "r"(to), "r"(packed.x), "r"(packed.y), "r"(packed.z), "r"(packed.w)
                     : "memory");
    }
    fence_async();
    named_barrier(1, COMPUTE_THREADS);
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
    state.reset(rows.first + warp / 4 / KEY_GROUPS * HOPPER_ROWS + warp % 4 * 16 + g);
}

/* Called by all compute warps. Only tiles from `ragged` on have positions that some row does not see. */
__device__ __forceinline__ void attend(FragmentRows &state, const Stages &stages, int first, int last, int ragged)
{
    int warpgroup = threadIdx.x / WARPGROUP, key_group = warpgroup % KEY_GROUPS;
    unsigned queries = stages.queries() + warpgroup / KEY_GROUPS * 8 * EIGHT_ROWS;
    for (int i = key_group; i < last - first; i += KEY_GROUPS) {
        int stage = i % STAGES;
        stages.ring().wait_until_full(i);
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
        if (first + i >= ragged) mask_scores(score, state, (first + i) * TILE);
        softmax_step(score, state);

        unsigned p[TILE / 16][4];
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) p[k][j] = pack<KVValue>(score[k * 8 + j * 2], score[k * 8 + j * 2 + 1]);
        pin(state.sum);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
            wgmma(state.sum, p[k], descriptor(stages.values(stage) + k * 2 * EIGHT_ROWS, EIGHT_ROWS, 1024));
        wgmma_commit();
        wgmma_wait<0>();
        pin(state.sum);
        if (threadIdx.x % WARPGROUP == 0) barrier_arrive(stages.ring().empty(stage));
    }
    finish_totals(state);
}

/* Called by all compute warps: their rows of one part; shared memory is that of the tiles. */
__device__ __forceinline__ void write_part(const FragmentRows &state, float *shared, const PartsView &parts, int part,
                                           const QueryRows &rows)
{
    named_barrier(1, COMPUTE_THREADS);
    int thread = threadIdx.x % WARPGROUP;
    stage_part<HOPPER_ROWS>(state, shared, threadIdx.x / WARPGROUP, thread / WARP * 16 + thread % WARP / 4);
    named_barrier(1, COMPUTE_THREADS);
    write_part<HOPPER_ROWS, KEY_GROUPS, BLOCK_ROWS, COMPUTE_THREADS, 4>(shared, parts, part, rows);
}

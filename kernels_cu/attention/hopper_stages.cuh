/* What a thread block of attention by wgmma has in shared memory, and the threads that fill it. A thread block has two
 * compute warpgroups, ROW_GROUPS * KEY_GROUPS = 2, and COPY_THREADS more: a warp that copies, or a warpgroup that
 * copies and gives its registers to the others. A warpgroup has WARPGROUP_ROWS query rows, which are 64 but over codes,
 * and every KEY_GROUPS-th tile of TILE positions. Tiles go through STAGES buffers by bulk copies. All query heads of a
 * kv head share every load.
 *
 * Compiled with HEAD_DIM (64 or 128), TILE (64 or 128), WARPGROUP_ROWS (16, 32 or 64), ROW_GROUPS, KEY_GROUPS,
 * COPY_THREADS and STAGES. */
#define COMPUTE_THREADS (WARPGROUP * ROW_GROUPS * KEY_GROUPS)
#define THREADS (COMPUTE_THREADS + COPY_THREADS)
#define BLOCK_ROWS (WARPGROUP_ROWS * ROW_GROUPS)
#define EIGHT_ROWS (HEAD_DIM * 16) /* bytes of operands */
#define TILE_BYTES (TILE * position_values(HEAD_DIM) * (int)sizeof(KVValue))
#define TILES_BYTES ((STAGES * 2 * TILE_BYTES + 1023) / 1024 * 1024)
#define QUERY_BYTES (BLOCK_ROWS * HEAD_DIM * 2)
static_assert(COMPUTE_THREADS == HOPPER_COMPUTE_THREADS && WARPGROUP_ROWS <= HOPPER_ROWS, "two warpgroups");
static_assert(HOPPER_ROWS == 64 && (IS_CODED || WARPGROUP_ROWS == 64), "rows of wgmma's first operand");

/* Of codes, weights in operands [64 keys][64 rows] of each warpgroup, and what its warps tell each other. */
#define WEIGHT_BYTES (IS_CODED ? 64 * 64 * 2 : 0)
#define EXCHANGE_BYTES (IS_CODED ? 4 * (64 + 1) * 4 : 0)

/* STAGES times keys and values, the queries, weights and exchange, two barriers per stage. */
struct Stages {
    unsigned base;
    __device__ __forceinline__ unsigned keys(int stage) const { return base + stage * 2 * TILE_BYTES; }
    __device__ __forceinline__ unsigned values(int stage) const { return keys(stage) + TILE_BYTES; }
    __device__ __forceinline__ unsigned queries() const { return base + TILES_BYTES; }
    __device__ __forceinline__ unsigned weights(int warpgroup) const
    {
        return queries() + QUERY_BYTES + warpgroup * WEIGHT_BYTES;
    }
    __device__ __forceinline__ unsigned exchange(int warpgroup) const
    {
        return weights(2) + warpgroup * EXCHANGE_BYTES;
    }
    __device__ __forceinline__ Ring ring() const { return {exchange(2)}; }
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

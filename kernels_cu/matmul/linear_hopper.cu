/* y = x [tokens, inner] times the transposed weight [rows, inner] by wgmma, for many tokens: a thread block has tiles
 * of TILE_TOKENS tokens and WIDTH rows, each of its two compute warpgroups 64 of the tokens. Where tiles are few, each
 * is divided among `splits` thread blocks, which have a share of the columns and a plane of y [splits, tokens, rows]
 * each (planes.cuh).
 *
 * With GATED the weights are joined gate and up projections, `rows` in all; a tile has WIDTH / 2 rows of each, and y
 * [tokens, rows / 2] = silu(gate) * up is narrowed for the matmul that follows. There is one split, and rows / 2 is
 * even.
 *
 * A thread of a third warpgroup copies STEP_COLUMNS columns of both at a time, through STAGES buffers of shared memory
 * and by tensor maps, whose boxes are TILE_TOKENS tokens of x and BOX_ROWS rows of the weights. Whatever is past
 * tokens, rows or `inner` (a multiple of 8) arrives as zeros. The CLUSTER thread blocks of a cluster have the same rows
 * and neighbouring tokens; each copies its share of the weights into all of them, so that the tensor cores do not wait
 * for the L2 cache. A stage is overwritten once the warpgroups of all these thread blocks have read it.
 *
 * Compiled with WIDTH (64, 128, 192 or 256), CLUSTER (1 or 2), STAGES and GATED. Grid: thread blocks, a multiple of
 * CLUSTER, at most one per SM, each with a tile. A cluster takes every (grid / CLUSTER)-th tile, tokens first, then
 * splits: tiles in flight share weights, and x stays in the L2 cache. Must do 2 * tokens * rows * inner operations. */
static_assert(TILE_TOKENS == 128 && LINEAR_HOPPER_THREADS == 3 * WARPGROUP, "two warpgroups of 64 tokens, one copies");
static_assert(STEP_COLUMNS == 64, "a row is 128 bytes");
#define ROW_BYTES (STEP_COLUMNS * 2)
#define X_BYTES (TILE_TOKENS * ROW_BYTES)
#define WEIGHT_BYTES (WIDTH * ROW_BYTES)
#define STAGE_BYTES (X_BYTES + WEIGHT_BYTES)
#define BOX_ROWS (WIDTH / (GATED ? 2 : CLUSTER))
#if GATED
using Output = Activation;
#else
using Output = float;
#endif

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(LINEAR_HOPPER_THREADS, 1)
    linear_hopper(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, Output *y, int tokens,
                  int rows, int inner, int splits)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    unsigned shared = shared_address(shared_bytes); /* STAGES times x and weights, then the ring's barriers */
    Ring ring = {shared + STAGES * STAGE_BYTES};
    auto x_of = [&](int stage) { return shared + stage * STAGE_BYTES; };
    auto weights_of = [&](int stage) { return x_of(stage) + X_BYTES; };
    int block = blockIdx.x % CLUSTER, first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    int steps = (inner + STEP_COLUMNS - 1) / STEP_COLUMNS;
    int across = (tokens + TILE_TOKENS * CLUSTER - 1) / (TILE_TOKENS * CLUSTER);
    int tiles = across * splits * ((rows + WIDTH - 1) / WIDTH); /* of the clusters */
    auto first_token = [&](int tile) { return (tile % across * CLUSTER + block) * TILE_TOKENS; };
    auto split_of = [&](int tile) { return tile / across % splits; };
    auto first_row = [&](int tile) { return tile / across / splits * (GATED ? WIDTH / 2 : WIDTH); };

    if (threadIdx.x == 0) {
        ring.initialize(2 * CLUSTER);
        fence_barrier_init();
        fence_async();
    }
    cluster_barrier();

    if (threadIdx.x >= 2 * WARPGROUP) {
        set_registers_down<40>();
        if (threadIdx.x == 2 * WARPGROUP) {
            auto load_weights = [&](int stage, int step, int row) {
                unsigned full = ring.full(stage);
                barrier_arrive_expecting(full, STAGE_BYTES);
#pragma unroll
                for (int box = block; box < WIDTH / BOX_ROWS; box += CLUSTER) {
                    unsigned to = weights_of(stage) + box * BOX_ROWS * ROW_BYTES;
                    int from = row + box * (GATED ? rows / 2 : BOX_ROWS);
                    if (CLUSTER == 1)
                        copy_box(to, &weight, step * STEP_COLUMNS, from, full);
                    else
                        copy_box_to((1 << CLUSTER) - 1, to, &weight, step * STEP_COLUMNS, from, full);
                }
            };
            prefetch_map(&x);
            prefetch_map(&weight);
            TileRange range = tiles_of_part(steps, split_of(first), splits);
            int early = min(STAGES, range.last - range.first), i = 0;
            for (int step = 0; step < early; step++) load_weights(step, range.first + step, first_row(first));
            wait_for_previous();
            for (int tile = first; tile < tiles; tile += stride) {
                int token = first_token(tile), row = first_row(tile);
                range = tiles_of_part(steps, split_of(tile), splits);
                for (int step = range.first; step < range.last; step++, i++) {
                    int stage = i % STAGES;
                    ring.wait_until_empty(i);
                    if (i >= early) load_weights(stage, step, row);
                    copy_box(x_of(stage), &x, step * STEP_COLUMNS, token, ring.full(stage));
                }
            }
            /* Once all stages have been read, by the other thread blocks of the cluster too, nothing more comes from
             * those, and this one may exit. */
            for (int last = i + STAGES; i < last; i++) ring.wait_until_empty(i);
        }
    } else {
        set_registers_up<232>();
        wait_for_previous();
        let_next_start();
        int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
        auto release = [&](int i) {
            if (thread < CLUSTER) barrier_arrive_in(thread, ring.empty(i % STAGES));
        };
        int i = 0;
        /* Uninitialised, or with steps unrolled, some compilers make each wgmma wait for the one before. */
        float sum[WIDTH / 2] = {};
        for (int tile = first; tile < tiles; tile += stride) {
            TileRange range = tiles_of_part(steps, split_of(tile), splits);
#pragma unroll 1
            for (int step = range.first; step < range.last; step++, i++) {
                int stage = i % STAGES;
                ring.wait_until_full(i);
                unsigned xs = x_of(stage) + warpgroup * 64 * ROW_BYTES, weights = weights_of(stage);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEP_COLUMNS / 16; k++)
                    wgmma(sum, descriptor(xs + k * 32, 8 * ROW_BYTES, 0),
                          descriptor(weights + k * 32, 8 * ROW_BYTES, 0), step == range.first && k == 0);
                wgmma_commit();
                /* The tensor cores work on this step while the previous one's stage is released. */
                wgmma_wait<1>();
                if (step > range.first) release(i - 1);
            }
            wgmma_wait<0>();
            pin(sum);
            release(i - 1);

            Output *to = y + (size_t)split_of(tile) * tokens * rows;
            store_sums<GATED>(sum, to, first_token(tile) + warpgroup * 64, first_row(tile), tokens, rows);
            pin(sum);
        }
    }
}

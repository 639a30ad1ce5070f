/* y [tokens, rows] = x [tokens, inner] times weight [rows, inner] transposed by a warpgroup's products, for many
 * tokens: a thread block has tiles of 128 tokens and WIDTH rows, each of its two computing warpgroups 64 tokens.
 *
 * A thread of a third warpgroup copies 64 columns of both at a time, through STAGES buffers of shared memory
 * and by tensor maps: their boxes are 128 tokens of x and WIDTH / CLUSTER rows of the weights. What is past
 * tokens, rows or `inner` (a multiple of 8) comes as zeros. The CLUSTER blocks of a cluster have the same rows
 * and neighbouring tokens; each copies its share of the weights into all of them, which is what keeps the tensor
 * cores from waiting for the L2 cache. A stage is written again when the warpgroups of all blocks have read it.
 *
 * Compiled with WIDTH (64, 128, 192 or 256), CLUSTER (1 or 2) and STAGES. Grid: blocks, a multiple of CLUSTER,
 * at most one a processor, none without a tile; 384 threads. A cluster takes every (grid / CLUSTER)-th tile, tokens
 * first: those at work at a time share weights, and x stays in the L2 cache. Must do 2 * tokens * rows * inner
 * operations. */
#define GROUP 128 /* threads of a warpgroup */
#define TOKENS 128
#define COLUMNS 64
#define ROW_BYTES (COLUMNS * 2)
#define X_BYTES (TOKENS * ROW_BYTES)
#define WEIGHT_BYTES (WIDTH * ROW_BYTES)
#define STAGE_BYTES (X_BYTES + WEIGHT_BYTES)

/* Shared memory: STAGES times x and weights, then two barriers a stage. */
struct Stages {
    unsigned base;
    __device__ __forceinline__ unsigned x(int stage) const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ unsigned weights(int stage) const { return x(stage) + X_BYTES; }
    __device__ __forceinline__ unsigned full(int stage) const { return base + STAGES * STAGE_BYTES + stage * 16; }
    __device__ __forceinline__ unsigned empty(int stage) const { return full(stage) + 8; }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(3 * GROUP, 1)
    linear_hopper(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, float *y, int tokens,
                  int rows, int inner)
{
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    Stages stages = {shared_address(shared_bytes)};
    int block = blockIdx.x % CLUSTER, first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    int steps = (inner + COLUMNS - 1) / COLUMNS, across = (tokens + TOKENS * CLUSTER - 1) / (TOKENS * CLUSTER);
    int tiles = across * ((rows + WIDTH - 1) / WIDTH); /* of the clusters */
    auto first_token = [&](int tile) { return (tile % across * CLUSTER + block) * TOKENS; };
    auto first_row = [&](int tile) { return tile / across * WIDTH; };

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(stages.full(s), 1);
            barrier_init(stages.empty(s), 2 * CLUSTER);
        }
        fence_barrier_init();
        fence_async();
    }
    cluster_barrier();

    if (threadIdx.x >= 2 * GROUP) {
        set_registers_down<40>();
        if (threadIdx.x == 2 * GROUP) {
            const TensorMap *x_map = &x, *weight_map = &weight;
            auto load_weights = [&](int stage, int step, int row) {
                int share = WIDTH / CLUSTER * block;
                unsigned to = stages.weights(stage) + share * ROW_BYTES, full = stages.full(stage);
                barrier_arrive_expecting(full, STAGE_BYTES);
                if (CLUSTER == 1)
                    copy_box(to, weight_map, step * COLUMNS, row + share, full);
                else
                    copy_box_to((1 << CLUSTER) - 1, to, weight_map, step * COLUMNS, row + share, full);
            };
            auto wait_until_read = [&](int i) { /* what the stage of load i had before */
                if (i >= STAGES) barrier_wait(stages.empty(i % STAGES), (i / STAGES - 1) & 1);
            };
            prefetch_map(x_map);
            prefetch_map(weight_map);
            int early = min(STAGES, steps), i = 0;
            for (int step = 0; step < early; step++) load_weights(step, step, first_row(first));
            wait_for_previous();
            for (int tile = first; tile < tiles; tile += stride) {
                int token = first_token(tile), row = first_row(tile);
                for (int step = 0; step < steps; step++, i++) {
                    int stage = i % STAGES;
                    wait_until_read(i);
                    if (i >= early) load_weights(stage, step, row);
                    copy_box(stages.x(stage), x_map, step * COLUMNS, token, stages.full(stage));
                }
            }
            /* Until all has been read, by the cluster's other blocks too: then nothing comes from them any more, and
             * this one may end. */
            for (int last = i + STAGES; i < last; i++) wait_until_read(i);
        }
    } else {
        set_registers_up<232>();
        wait_for_previous();
        let_next_start();
        int warpgroup = threadIdx.x / GROUP, thread = threadIdx.x % GROUP, g = thread % WARP / 4, t = thread % 4;
        auto release = [&](int i) {
            if (thread < CLUSTER) barrier_arrive_in(thread, stages.empty(i % STAGES));
        };
        int i = 0;
        /* Without a first value, or with steps unrolled, some compilers make each product wait for the one before. */
        float sum[WIDTH / 2] = {};
        for (int tile = first; tile < tiles; tile += stride) {
#pragma unroll 1
            for (int step = 0; step < steps; step++, i++) {
                int stage = i % STAGES;
                barrier_wait(stages.full(stage), i / STAGES & 1);
                unsigned xs = stages.x(stage) + warpgroup * 64 * ROW_BYTES, weights = stages.weights(stage);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < COLUMNS / 16; k++)
                    wgmma(sum, descriptor(xs + k * 32, 8 * ROW_BYTES, 0),
                          descriptor(weights + k * 32, 8 * ROW_BYTES, 0), step == 0 && k == 0);
                wgmma_commit();
                /* The tensor cores have the next step to do while the one before it is given back. */
                wgmma_wait<1>();
                if (step > 0) release(i - 1);
            }
            wgmma_wait<0>();
            pin(sum);
            release(i - 1);

#pragma unroll
            for (int half = 0; half < 2; half++) {
                int token = first_token(tile) + warpgroup * 64 + thread / WARP * 16 + g + half * 8;
                int row = first_row(tile) + t * 2;
                float *to = y + (size_t)token * rows + row;
                int left = token < tokens ? rows - row : 0;
                if (rows % 2 == 0) {
#pragma unroll
                    for (int n = 0; n < WIDTH / 8; n++)
                        if (n * 8 < left)
                            *(float2 *)(to + n * 8) = make_float2(sum[n * 4 + half * 2], sum[n * 4 + half * 2 + 1]);
                } else {
#pragma unroll
                    for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                        for (int j = 0; j < 2; j++)
                            if (n * 8 + j < left) to[n * 8 + j] = sum[n * 4 + half * 2 + j];
                }
            }
            pin(sum);
        }
    }
}

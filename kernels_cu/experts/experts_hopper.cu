/* Each expert's matmul of its rows by wgmma (experts/gated.cuh): x [places, inner] is in the order of the list, from
 * expert_rows or from this kernel with GATED, whose results are y [places, rows / 2] in that order, too; else they are
 * y planes [slots, tokens, rows]. inner is a multiple of 8, and results of a row are a multiple of 2.
 *
 * A thread block has tiles of an item, up to 64 places for each of its ROW_GROUPS compute warpgroups, by WIDTH rows of
 * its weights, with GATED WIDTH / 2 gates and their ups. A thread of another warpgroup copies STEP_COLUMNS columns of
 * both at a time, as in linear_hopper: boxes of `x_box` places, of which there are 64 or fewer in all, and of WIDTH /
 * (1 + GATED) rows. Places past the item's are the next ones', or what was there before; their sums are not written.
 * The list is not made by the kernel before this one, so that weights are copied while that still runs.
 *
 * Compiled with ROW_GROUPS, WIDTH, STAGES and GATED. Grid: at most one thread block per SM, which takes every
 * gridDim.x-th tile, those of an item one after the other: they share x. Must read the weights of experts that have
 * rows once, and do 2 * places * rows * inner operations. */
static_assert(STEP_COLUMNS == 64, "a row is 128 bytes");
#define ROW_BYTES (STEP_COLUMNS * 2)
#define X_GROUP_BYTES (HOPPER_ROWS * ROW_BYTES)
#define X_BYTES (ROW_GROUPS * X_GROUP_BYTES)
#define WEIGHT_BYTES (WIDTH * ROW_BYTES)
#define STAGE_BYTES (X_BYTES + WEIGHT_BYTES)
#define TILE_OUTPUTS (GATED ? WIDTH / 2 : WIDTH)

extern "C" __global__ void __launch_bounds__((ROW_GROUPS + 1) * WARPGROUP, 1)
    experts_hopper(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, Output *y,
                   RoutingView routing, int rows, int inner, int x_box)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    unsigned shared = shared_address(shared_bytes); /* STAGES times x and weights, then the ring's barriers */
    Ring ring = {shared + STAGES * STAGE_BYTES};
    auto x_of = [&](int stage) { return shared + stage * STAGE_BYTES; };
    auto weights_of = [&](int stage) { return x_of(stage) + X_BYTES; };
    if (threadIdx.x == 0) {
        ring.initialize(ROW_GROUPS);
        fence_barrier_init();
        fence_async();
    }
    __syncthreads();
    int steps = (inner + STEP_COLUMNS - 1) / STEP_COLUMNS, outputs = outputs_of(rows);
    int across = (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS, tiles = *routing.item_count * across;

    if (threadIdx.x >= ROW_GROUPS * WARPGROUP) {
#if ROW_GROUPS == 2
        set_registers_down<40>();
#endif
        if (threadIdx.x == ROW_GROUPS * WARPGROUP) {
            auto load_weights = [&](int stage, int step, int tile, const ExpertItem &item) {
                unsigned full = ring.full(stage), to = weights_of(stage);
                int column = step * STEP_COLUMNS, row = item.expert * rows + tile % across * TILE_OUTPUTS;
                barrier_arrive_expecting(full, WEIGHT_BYTES + (item.count > HOPPER_ROWS ? 2 : 1) * x_box * ROW_BYTES);
                copy_box(to, &weight, column, row, full);
                if (GATED) copy_box(to + WEIGHT_BYTES / 2, &weight, column, row + outputs, full);
            };
            prefetch_map(&x);
            prefetch_map(&weight);
            int early = blockIdx.x < tiles ? min(STAGES, steps) : 0, i = 0;
            if (early) {
                ExpertItem item = routing.item(blockIdx.x / across);
                for (int step = 0; step < early; step++) load_weights(step, step, blockIdx.x, item);
            }
            wait_for_previous();
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                ExpertItem item = routing.item(tile / across);
                for (int step = 0; step < steps; step++, i++) {
                    int stage = i % STAGES, column = step * STEP_COLUMNS;
                    ring.wait_until_empty(i);
                    if (i >= early) load_weights(stage, step, tile, item);
                    copy_box(x_of(stage), &x, column, item.first, ring.full(stage));
                    if (item.count > HOPPER_ROWS)
                        copy_box(x_of(stage) + X_GROUP_BYTES, &x, column, item.first + HOPPER_ROWS, ring.full(stage));
                }
            }
        }
    } else {
#if ROW_GROUPS == 2
        set_registers_up<232>();
#endif
        wait_for_previous();
        let_next_start();
        int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
        int g = thread % WARP / 4, t = thread % 4;
        auto release = [&](int i) {
            if (thread == 0) barrier_arrive(ring.empty(i % STAGES));
        };
        int i = 0;
        float sum[WIDTH / 2] = {}; /* as in linear_hopper */
        ExpertItem item, next = {};
        if (blockIdx.x < tiles) next = routing.item(blockIdx.x / across);
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            item = next;
            if (tile + gridDim.x < tiles) next = routing.item((tile + gridDim.x) / across);
            if (warpgroup * HOPPER_ROWS >= item.count) {
                for (int step = 0; step < steps; step++, i++) {
                    ring.wait_until_full(i);
                    release(i);
                }
                continue;
            }
#if !GATED
            int place[2];
            float factor[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int of_item = warpgroup * HOPPER_ROWS + thread / WARP * 16 + g + half * 8;
                place[half] = routing.places[item.first + min(of_item, item.count - 1)];
                factor[half] = routing.weights[place[half]];
            }
#endif
#pragma unroll 1
            for (int step = 0; step < steps; step++, i++) {
                int stage = i % STAGES;
                ring.wait_until_full(i);
                unsigned xs = x_of(stage) + warpgroup * X_GROUP_BYTES, weights = weights_of(stage);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEP_COLUMNS / 16; k++)
                    wgmma(sum, descriptor(xs + k * 32, 8 * ROW_BYTES, 0),
                          descriptor(weights + k * 32, 8 * ROW_BYTES, 0), step == 0 && k == 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (step > 0) release(i - 1);
            }
            wgmma_wait<0>();
            pin(sum);
            release(i - 1);

#pragma unroll
            for (int half = 0; half < 2; half++) {
                int of_item = warpgroup * HOPPER_ROWS + thread / WARP * 16 + g + half * 8;
                int column = tile % across * TILE_OUTPUTS + t * 2;
                int left = of_item < item.count ? outputs - column : 0;
#if GATED
                Output *to = y + (size_t)(item.first + of_item) * outputs + column;
#pragma unroll
                for (int n = 0; n < WIDTH / 16; n++) {
                    const float *gate = sum + n * 4 + half * 2, *up = gate + WIDTH / 4;
                    if (n * 8 < left)
                        *(unsigned *)(to + n * 8) = pack<Output>(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
                }
#else
                Output *to = y + routing.row_of_planes(place[half]) * rows + column;
#pragma unroll
                for (int n = 0; n < WIDTH / 8; n++)
                    if (n * 8 < left)
                        *(float2 *)(to + n * 8) =
                            make_float2(sum[n * 4 + half * 2] * factor[half], sum[n * 4 + half * 2 + 1] * factor[half]);
#endif
            }
            pin(sum);
        }
    }
}

/* Each expert's matmul of its rows on tensor cores, where an expert has many (experts/gated.cuh): x [tokens, inner]
 * with GATED, whose results are y [places, rows / 2] in the order of the list; else x is those, and y planes [slots,
 * tokens, rows]. A thread block has a tile of an item, up to TILE_TOKENS places, by TILE_ROWS rows of weights, a warp
 * 64 and 32 of them, as in linear_tiles. inner is a multiple of 8.
 *
 * Compiled with STAGES and GATED. Grid: (rows / TILE_ROWS, items at most): thread blocks that run together share x.
 * Must do 2 * places * rows * inner operations, and read the weights of experts that have rows. */
static_assert(TILE_TOKENS == 128 && TILE_ROWS == 128 && LINEAR_TILES_THREADS == 256, "8 warps of 64 by 32");
#define TILE_BYTES (TILE_ROWS * ROW_BYTES)
#define TILE_OUTPUTS (GATED ? TILE_ROWS / 2 : TILE_ROWS)

extern "C" __global__ void __launch_bounds__(LINEAR_TILES_THREADS)
    experts_tiles(const Activation *x, WeightView weight, Output *y, RoutingView routing)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    wait_for_previous();
    let_next_start();
    if (blockIdx.y >= *routing.item_count) return;
    unsigned shared = shared_address(shared_bytes);
    ExpertItem item = routing.item(blockIdx.y);
    int rows = weight.rows, inner = weight.inner, outputs = outputs_of(rows), first_output = blockIdx.x * TILE_OUTPUTS;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int steps = (inner + STEP_COLUMNS - 1) / STEP_COLUMNS, warp_place = warp % 2 * 64, warp_row = warp / 2 * 32;
    const WeightValue *of_expert = weight.data() + (size_t)item.expert * rows * inner;
    const int each = TILE_ROWS * 8 / LINEAR_TILES_THREADS;
    int x_row[each]; /* past the end the last one; their sums are not written */
#pragma unroll
    for (int i = 0; i < each; i++) {
        int row = item.first + min((int)threadIdx.x / 8 + i * LINEAR_TILES_THREADS / 8, item.count - 1);
        x_row[i] = GATED ? routing.token(row) : row;
    }

    auto load = [&](int step) {
        unsigned stage = shared + step % STAGES * 2 * TILE_BYTES;
        int piece = threadIdx.x % 8, k = step * STEP_COLUMNS + piece * 8;
        bool inside = k < inner;
        if (!inside) k = 0;
#pragma unroll
        for (int i = 0; i < each; i++) {
            int row = threadIdx.x / 8 + i * LINEAR_TILES_THREADS / 8, place = place_for_matrices(row, piece);
            copy_16_bytes_async(stage + place, x + (size_t)x_row[i] * inner + k, inside);
            copy_16_bytes_async(stage + TILE_BYTES + place,
                                of_expert + (size_t)weight_row(first_output, row, rows) * inner + k, inside);
        }
    };
    start_copies<STAGES>(0, steps, load);

    float sum[4][4][4] = {};
    for (int step = 0; step < steps; step++) {
        advance_copies<STAGES>(step, steps, load);
        if (warp_place >= item.count) continue;
        unsigned xs = shared + step % STAGES * 2 * TILE_BYTES;
        multiply_tiles(sum, xs, xs + TILE_BYTES, warp_place, warp_row);
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int of_item = warp_place + m * 16 + g + j / 2 * 8;
            if (of_item >= item.count) continue;
#if GATED
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                int output = first_output + warp_row / 2 + n * 4 + t * 2 + j % 2;
                if (output < outputs)
                    y[(size_t)(item.first + of_item) * outputs + output] =
                        narrow<Output>(silu(sum[m][n][j]) * sum[m][n + 1][j]);
            }
#else
            int place = routing.places[item.first + of_item];
            float *to = y + routing.row_of_planes(place) * rows, factor = routing.weights[place];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                int output = first_output + warp_row + n * 8 + t * 2 + j % 2;
                if (output < outputs) to[output] = sum[m][n][j] * factor;
            }
#endif
        }
}

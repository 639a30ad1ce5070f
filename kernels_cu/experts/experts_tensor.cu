/* Each expert's matmul of its rows on tensor cores, where an expert has few (experts/gated.cuh): x [tokens, inner] with
 * GATED, whose results are y [places, rows / 2] in the order of the list; else x is those, and y planes
 * [slots, tokens, rows]. inner is a multiple of 8.
 *
 * A unit is an item, up to X_ROWS places of an expert, by a panel of EXPERT_PANEL rows of its weights. A thread block
 * takes every gridDim.x-th one, and never stops reading: STEP_COLUMNS columns at a time go through STAGES buffers of
 * shared memory, on into the next unit without a pause. A sum is whole in a warp, and the same whatever else there is.
 *
 * A warp takes 16 rows of weights as the A operand; places are the columns of B, 8 at a time, as in linear_tensor.
 *
 * Compiled with LINEAR_TILES = most places of an item / 8, STAGES and GATED. Grid: any, so that no thread block has
 * more than the units that there is shared memory for. Must read the weights of experts that have rows once. */
static_assert(EXPERT_PANEL == EXPERT_THREADS / WARP * 16, "a warp has 16 rows of a panel");
#define X_ROWS (LINEAR_TILES * 8)
#define STAGE_BYTES ((EXPERT_PANEL + X_ROWS) * ROW_BYTES)
#define PANEL_OUTPUTS (GATED ? EXPERT_PANEL / 2 : EXPERT_PANEL)

struct Unit {
    int expert, first, count, panel;
    int places[X_ROWS]; /* with GATED tokens */
#if !GATED
    float weights[X_ROWS];
#endif
};
static_assert(sizeof(Unit) == EXPERT_UNIT_BYTES + X_ROWS * (GATED ? 4 : 8), "as in expert_plans.py");

extern "C" __global__ void __launch_bounds__(EXPERT_THREADS, 2)
    experts_tensor(const Activation *x, WeightView weight, Output *y, RoutingView routing)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    Unit *units = (Unit *)(shared_bytes + STAGES * STAGE_BYTES);
    if (GATED) { /* the kernel before has made the list; else the one before that */
        wait_for_previous();
        let_next_start();
    }
    int rows = weight.rows, inner = weight.inner, outputs = outputs_of(rows), slots = routing.slots;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int steps = (inner + STEP_COLUMNS - 1) / STEP_COLUMNS, panels = (outputs + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    int left = *routing.item_count * panels - (int)blockIdx.x;
    int count = left > 0 ? (left + gridDim.x - 1) / gridDim.x : 0, total = count * steps;
    for (int i = threadIdx.x; i < count; i += EXPERT_THREADS) {
        int unit = blockIdx.x + i * gridDim.x;
        ExpertItem item = routing.item(unit / panels);
        units[i].expert = item.expert, units[i].first = item.first, units[i].count = item.count;
        units[i].panel = unit % panels;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * X_ROWS; i += EXPERT_THREADS) {
        Unit &unit = units[i / X_ROWS];
        int row = i % X_ROWS;
        if (row >= unit.count) continue;
        int place = routing.places[unit.first + row];
        unit.places[row] = GATED ? place / slots : place;
#if !GATED
        unit.weights[row] = routing.weights[place];
#endif
    }
    __syncthreads();

    auto load_weights = [&](int i) {
        unsigned stage = shared_address(shared_bytes + i % STAGES * STAGE_BYTES);
        const Unit &unit = units[i / steps];
        int piece = threadIdx.x % 8, k = i % steps * STEP_COLUMNS + piece * 8;
        bool inside = k < inner;
        const WeightValue *from = weight.data() + (size_t)unit.expert * rows * inner + (inside ? k : 0);
#pragma unroll
        for (int row = threadIdx.x / 8; row < EXPERT_PANEL; row += EXPERT_THREADS / 8)
            copy_16_bytes_async(stage + place_for_lanes(row, piece),
                                from + (size_t)weight_row(unit.panel * PANEL_OUTPUTS, row, rows) * inner, inside);
    };
    auto load_x = [&](int i) {
        unsigned stage = shared_address(shared_bytes + i % STAGES * STAGE_BYTES);
        const Unit &unit = units[i / steps];
        int piece = threadIdx.x % 8, k = i % steps * STEP_COLUMNS + piece * 8;
        bool inside = k < inner;
#pragma unroll
        for (int row = threadIdx.x / 8; row < X_ROWS; row += EXPERT_THREADS / 8)
            if (row < unit.count) /* sums of others are not written */
                copy_16_bytes_async(
                    stage + place_for_lanes(EXPERT_PANEL + row, piece),
                    x + (size_t)(GATED ? unit.places[row] : unit.first + row) * inner + (inside ? k : 0), inside);
    };
    for (int i = 0; i < min(STAGES - 1, total); i++) load_weights(i);
    if (!GATED) {
        wait_for_previous();
        let_next_start();
    }
    start_copies<STAGES>(0, total, load_x);

    for (int i = 0, step = 0; i < total;) {
        const Unit &unit = units[i / steps];
        int tiles = (unit.count + 7) / 8;
        float sum[LINEAR_TILES][4] = {};
        for (step = 0; step < steps; step++, i++) {
            advance_copies<STAGES>(i, total, [&](int next) {
                load_weights(next);
                load_x(next);
            });
            const unsigned char *stage = shared_bytes + i % STAGES * STAGE_BYTES;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = warp * 16 + g, piece = half * 4 + t;
                uint4 a = *(const uint4 *)(stage + place_for_lanes(row, piece));
                uint4 b = *(const uint4 *)(stage + place_for_lanes(row + 8, piece));
#pragma unroll
                for (int n = 0; n < LINEAR_TILES; n++) {
                    if (n >= tiles) break;
                    uint4 v = *(const uint4 *)(stage + place_for_lanes(EXPERT_PANEL + n * 8 + g, piece));
                    mma(sum[n], a.x, b.x, a.y, b.y, v.x, v.y);
                    mma(sum[n], a.z, b.z, a.w, b.w, v.z, v.w);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < LINEAR_TILES; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = n * 8 + t * 2 + j;
                if (column >= unit.count) continue;
#if GATED
                int output = unit.panel * PANEL_OUTPUTS + warp * 8 + g;
                if (output < outputs)
                    y[(size_t)(unit.first + column) * outputs + output] =
                        narrow<Output>(silu(sum[n][j]) * sum[n][j + 2]);
#else
                float *to = y + routing.row_of_planes(unit.places[column]) * rows;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int output = unit.panel * PANEL_OUTPUTS + warp * 16 + g + half * 8;
                    if (output < outputs) to[output] = sum[n][j + half * 2] * unit.weights[column];
                }
#endif
            }
    }
}

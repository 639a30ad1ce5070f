/* Each expert's matmul of its rows by codes, on tensor cores: x [places, inner] is in the order of the list, from
 * expert_rows or from this kernel; inner is a multiple of 8. Results are y [places, rows / 2] in that order, silu(gate)
 * * up, where that is not null: then an expert's rows are eight gates, their ups, the next eight gates and so on, so
 * that a thread has both. Else they are planes [slots, tokens, rows], each place's times its weight.
 *
 * A tile is an item, up to X_ROWS places of an expert, by a panel of its rows; quantized_panels.cuh has how it is
 * multiplied. A thread block takes every gridDim.x-th one, and never stops reading: copies go on into the next tile
 * without a pause. A sum is whole in a warp, and the same whatever else there is. The list is not made by the kernel
 * before this one, so that codes are copied while that still runs.
 *
 * The view is that of the first expert, which the others follow. Compiled with what quantized_panels.cuh is compiled
 * with, K_GROUPS = 1, and RESIDENT, the thread blocks of an SM. Grid: any. Must read codes and scales of experts that
 * have rows once for X_ROWS of them. */
static_assert(K_GROUPS == 1, "a warp has whole sums");
#define X_PIECES (QUANTIZED_UNIT / 8) /* of a row of x in a unit */

struct Cursor {
    int tile, unit;
    ExpertItem item;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    experts_quantized(const Activation *x, QuantizedView weight, Activation *y, float *planes, RoutingView routing)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[]; /* codes of each warp, and x */
    int rows = weight.rows, inner = weight.inner, outputs = y ? rows / 2 : rows;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int panel_units = (inner + QUANTIZED_UNIT - 1) / QUANTIZED_UNIT;
    int panels = (rows + QUANTIZED_PANEL - 1) / QUANTIZED_PANEL, tiles = *routing.item_count * panels;
    int own_tiles = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    int units = max(0, own_tiles) * panel_units;
    unsigned char *own = shared_bytes + warp * (STAGES * STAGE_BYTES);
    unsigned char *xs = shared_bytes + THREADS / WARP * (STAGES * STAGE_BYTES);
    auto begin = [&](int tile) -> Cursor {
        return {tile, 0, tile < tiles ? routing.item(tile / panels) : ExpertItem{}};
    };
    auto advance = [&](Cursor &at) {
        if (++at.unit == panel_units) at = begin(at.tile + gridDim.x);
    };
    Cursor at = begin(blockIdx.x), loads = at, of_x = at;

    const char *codes_at;
    int group_units = GROUPS == 1 ? weight.group / QUANTIZED_UNIT : 1, group, in_group;
    auto begin_panel = [&] {
        size_t panel = (size_t)loads.item.expert * panels + loads.tile % panels;
        codes_at = (const char *)weight.codes + lane * 16;
        codes_at += (panel * panel_units * UNIT_STEPS * ROW_WARPS + warp) * CODES_BYTES;
        group = panel * weight.groups, in_group = 0;
    };
    auto load_weights = [&](int stage) {
        if (loads.unit == 0) begin_panel();
        copy_weights(own + stage * STAGE_BYTES, weight, codes_at, group, warp, 0);
        codes_at += UNIT_STEPS * ROW_WARPS * CODES_BYTES;
        if (GROUPS > 1)
            group += GROUPS;
        else if (++in_group == group_units)
            in_group = 0, group++;
        advance(loads);
    };
    auto load_x = [&](int stage, bool at_once) {
        unsigned char *to = xs + stage % X_STAGES * X_BYTES;
#pragma unroll 1
        for (int unit = 0; unit < X_UNITS && of_x.tile < tiles; unit++, to += X_ROWS * X_ROW_BYTES) {
#pragma unroll
            for (int i = 0; i < X_ROWS * X_PIECES / THREADS; i++) {
                int p = i * THREADS + threadIdx.x, piece = p % X_PIECES, row = p / X_PIECES;
                if (row >= of_x.item.count) break; /* sums of others are not written */
                int k = of_x.unit * QUANTIZED_UNIT + piece * 8;
                bool inside = k < inner;
                const Activation *from = x + (size_t)(of_x.item.first + row) * inner + (inside ? k : 0);
                copy_x(to + row * X_ROW_BYTES + piece * 16, from, inside, at_once);
            }
            advance(of_x);
        }
    };
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < units) load_weights(i);
        commit_copies();
    }
    wait_for_previous();
    let_next_start();
    /* The first ones overtake the codes that are on their way, as in linear_quantized. */
#pragma unroll 1
    for (int i = 0; i < X_STAGES - 1; i++) load_x(i, true);

    Sums sum = {};
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < units; i++) {
        wait_copies<STAGES - 2>();
        int x_stage = i / X_UNITS;
        if (i % X_UNITS == 0) {
            __syncthreads();
            load_x(x_stage + X_STAGES - 1, false);
        } else {
            __syncwarp(); /* lanes read scales that others have copied */
        }
        if (i + STAGES - 1 < units) load_weights(stage ? stage - 1 : STAGES - 1);
        commit_copies();
        const unsigned char *of_unit = xs + x_stage % X_STAGES * X_BYTES + i % X_UNITS * (X_ROWS * X_ROW_BYTES);
        int places = at.item.count;
#pragma unroll 1
        for (int step = 0; step < UNIT_STEPS; step++)
            multiply(sum, own + stage * STAGE_BYTES + step * STEP_BYTES, of_unit + step * (STEP_COLUMNS * 2),
                     (places + 7) / 8);
        stage = stage + 1 < STAGES ? stage + 1 : 0;
        if (at.unit + 1 == panel_units) {
            int first_row = at.tile % panels * QUANTIZED_PANEL + warp * CODE_ROWS;
#pragma unroll
            for (int n = 0; n < LINEAR_TILES; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int column = n * 8 + t * 2 + j;
                    if (column >= places) continue;
                    if (y) {
                        int first = first_row / 2 + g;
                        Activation *to = y + (size_t)(at.item.first + column) * outputs + first;
#pragma unroll
                        for (int m = 0; m < 2; m++)
                            if (first + m * 8 < outputs)
                                to[m * 8] = narrow<Activation>(silu(sum[m][n][j]) * sum[m][n][j + 2]);
                    } else {
                        int place = routing.places[at.item.first + column], first = first_row + g;
                        float *to = planes + routing.row_of_planes(place) * rows + first;
                        float factor = routing.weights[place];
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (first + i * 8 < rows) to[i * 8] = sum[i / 2][n][j + i % 2 * 2] * factor;
                    }
                }
            each_sum(sum, [](int, int, int, int, float &value) { value = 0; });
        }
        advance(at);
    }
}

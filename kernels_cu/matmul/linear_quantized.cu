/* y = x [tokens, inner] times the transposed matrix of codes [rows, inner] on tensor cores, for up to SKINNY_TOKENS
 * tokens; y is left as planes (matmul/planes.cuh) of plane_tokens tokens, of which these are the first ones from y on.
 *
 * As in linear_tensor.cu thread blocks take `share` consecutive units each of one long list, here of QUANTIZED_PANEL
 * rows and QUANTIZED_UNIT columns; quantized_panels.cuh has how they are multiplied.
 *
 * Compiled with what that is compiled with. Grid: units / share. Must read the codes and scales once. */
static_assert(LINEAR_TILES * 8 <= SKINNY_TOKENS, "more tokens need another kernel");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_quantized(const Activation *x, QuantizedView weight, float *y, int tokens, int plane_tokens, int share)
{
    /* Codes of each warp, x, and sums of warps that share rows. */
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    int rows = weight.rows, inner = weight.inner;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int row_warp = warp % ROW_WARPS, k_group = warp / ROW_WARPS;
    int panel_units = (inner + QUANTIZED_UNIT - 1) / QUANTIZED_UNIT;
    int panels = (rows + QUANTIZED_PANEL - 1) / QUANTIZED_PANEL;
    int first = blockIdx.x * share, units = min(share, panels * panel_units - first);
    int panel = first / panel_units, unit = first % panel_units; /* in the panel */
    unsigned char *own = shared_bytes + warp * (STAGES * STAGE_BYTES);
    unsigned char *xs = shared_bytes + THREADS / WARP * (STAGES * STAGE_BYTES);

    /* Codes follow one another from unit to unit, as do scales unless several units share a group. */
    const char *codes_at = (const char *)weight.codes + lane * 16;
    codes_at += ((size_t)first * UNIT_STEPS * ROW_WARPS + warp) * CODES_BYTES;
    int group_units = GROUPS == 1 ? weight.group / QUANTIZED_UNIT : 1, load_unit = unit, in_group = unit % group_units;
    int groups = weight.groups, group = panel * groups + unit / group_units * GROUPS;
    auto load_weights = [&](int stage) {
        copy_weights(own + stage * STAGE_BYTES, weight, codes_at, group, row_warp, k_group);
        codes_at += UNIT_STEPS * ROW_WARPS * CODES_BYTES;
        if (GROUPS > 1) {
            group += GROUPS;
        } else {
            if (++in_group == group_units) in_group = 0, group++;
            if (++load_unit == panel_units) {
                group += in_group > 0; /* the panel's last one, which has fewer units */
                load_unit = in_group = 0;
            }
        }
    };
    int x_unit = unit;
    auto load_x = [&](int stage, bool at_once) {
        unsigned char *to = xs + stage % X_STAGES * X_BYTES;
#pragma unroll
        for (int i = 0; i < X_UNITS * X_ROWS * (QUANTIZED_UNIT / 8) / THREADS; i++) {
            int p = i * THREADS + threadIdx.x, piece = p % (QUANTIZED_UNIT / 8), row = p / (QUANTIZED_UNIT / 8);
            int token = row % X_ROWS, at = x_unit + row / X_ROWS;
            if (at >= panel_units) at = panel_units > X_UNITS ? at - panel_units : at % panel_units;
            int k = at * QUANTIZED_UNIT + piece * 8, place = row * X_ROW_BYTES + piece * 16;
            bool inside = k < inner && token < tokens;
            const Activation *from = inside ? x + (size_t)token * inner + k : x;
            copy_x(to + place, from, inside, at_once);
        }
        x_unit = (x_unit + X_UNITS) % panel_units;
    };
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < units) load_weights(i);
        commit_copies();
    }
    wait_for_previous();
    let_next_start();
    /* The first ones overtake the codes that are on their way: asynchronous copies complete in order. */
    int x_stages = (units + X_UNITS - 1) / X_UNITS;
#pragma unroll 1
    for (int i = 0; i < min(X_STAGES - 1, x_stages); i++) load_x(i, true);

    Sums sum = {};
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < units; i++) {
        wait_copies<STAGES - 2>();
        int x_stage = i / X_UNITS;
        if (i % X_UNITS == 0) {
            __syncthreads();
            if (x_stage + X_STAGES - 1 < x_stages) load_x(x_stage + X_STAGES - 1, false);
        } else {
            __syncwarp(); /* lanes read scales that others have copied */
        }
        if (i + STAGES - 1 < units) load_weights(stage ? stage - 1 : STAGES - 1);
        commit_copies();
        const unsigned char *of_unit = xs + x_stage % X_STAGES * X_BYTES + i % X_UNITS * (X_ROWS * X_ROW_BYTES);
#pragma unroll 1
        for (int step = 0; step < OWN_STEPS; step++)
            multiply(sum, own + stage * STAGE_BYTES + step * STEP_BYTES,
                     of_unit + (step * K_GROUPS + k_group) * (STEP_COLUMNS * 2));
        stage = stage + 1 < STAGES ? stage + 1 : 0;
        if (++unit < panel_units && i + 1 < units) continue;

        float *others = (float *)(xs + X_STAGES * X_BYTES) + row_warp * (LINEAR_TILES * 8 * WARP) + lane;
        if (K_GROUPS == 2) {
            __syncthreads(); /* others' may still be read */
            if (k_group == 1) each_sum(sum, [&](int at, int, int, int, float mine) { others[at * WARP] = mine; });
            __syncthreads();
        }
        int plane = blockIdx.x - panel * panel_units / share;
        each_sum(sum, [&](int at, int m, int n, int j, float &mine) {
            int token = n * 8 + t * 2 + j % 2;
            int row = panel * QUANTIZED_PANEL + row_warp * CODE_ROWS + m * 16 + g + j / 2 * 8;
            if (k_group == 0 && token < tokens && row < rows)
                y[((size_t)plane * plane_tokens + token) * rows + row] =
                    mine + (K_GROUPS == 2 ? others[at * WARP] : 0.0f);
            mine = 0;
        });
        unit = 0, panel++;
    }
}

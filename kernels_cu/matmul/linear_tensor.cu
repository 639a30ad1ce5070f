/* y = x [tokens, inner] times the transposed weight [rows, inner] on tensor cores, for up to SKINNY_TOKENS tokens; y
 * is left as planes (matmul/planes.cuh) of plane_tokens tokens, of which these are the first ones from y on.
 *
 * The weights are one long list of units of PANEL_ROWS rows and STEP_COLUMNS columns. Each thread block takes `share`
 * consecutive units, so that all read equally much and never stop reading: copies go through STAGES buffers of shared
 * memory, on into the next panel without a pause. A thread block writes its sums of a panel to a plane of its own.
 * Columns past `inner` (a multiple of 8) are zeros.
 *
 * A warp takes 16 weight rows as the A operand; tokens are the columns of B, 8 at a time. Which columns of `inner` a
 * fragment's k stands for is free as long as both operands agree: a lane reads 8 neighbouring columns, 16 bytes, which
 * are swizzled by row so that a read has no bank conflicts.
 *
 * Compiled with LINEAR_TILES = tokens / 8 and STAGES. Grid: units / share. Must read rows * inner weights once. */
static_assert(LINEAR_TILES * 8 <= SKINNY_TOKENS, "more tokens need another kernel");
static_assert(PANEL_ROWS == LINEAR_TENSOR_THREADS / WARP * 16, "a warp has 16 rows of a panel");
#define X_ROWS (LINEAR_TILES * 8)
#define STAGE_BYTES ((PANEL_ROWS + X_ROWS) * ROW_BYTES)

extern "C" __global__ void __launch_bounds__(LINEAR_TENSOR_THREADS, 2)
    linear_tensor(const Activation *x, WeightView weight, float *y, int tokens, int plane_tokens, int share)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    int rows = weight.rows, inner = weight.inner;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int steps = (inner + STEP_COLUMNS - 1) / STEP_COLUMNS, panels = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
    int first = blockIdx.x * share, units = min(share, panels * steps - first);

    auto load_weights = [&](int i) {
        unsigned stage = shared_address(shared_bytes + i % STAGES * STAGE_BYTES);
        int panel = (first + i) / steps, column = (first + i) % steps * STEP_COLUMNS;
        int piece = threadIdx.x % 8, k = column + piece * 8;
        bool inside = k < inner;
#pragma unroll
        for (int row = threadIdx.x / 8; row < PANEL_ROWS; row += LINEAR_TENSOR_THREADS / 8) {
            /* Rows past the end repeat the last one; their sums are not written. */
            const WeightValue *from =
                weight.data() + (size_t)min(panel * PANEL_ROWS + row, rows - 1) * inner + (inside ? k : 0);
            copy_16_bytes_async(stage + place_for_lanes(row, piece), from, inside);
        }
    };
    auto load_x = [&](int i) {
        unsigned stage = shared_address(shared_bytes + i % STAGES * STAGE_BYTES);
        int piece = threadIdx.x % 8, k = (first + i) % steps * STEP_COLUMNS + piece * 8;
#pragma unroll
        for (int row = threadIdx.x / 8; row < X_ROWS; row += LINEAR_TENSOR_THREADS / 8) {
            bool inside = k < inner && row < tokens;
            const Activation *from = inside ? x + (size_t)row * inner + k : x;
            copy_16_bytes_async(stage + place_for_lanes(PANEL_ROWS + row, piece), from, inside);
        }
    };
    for (int i = 0; i < min(STAGES - 1, units); i++) load_weights(i);
    wait_for_previous();
    let_next_start();
    start_copies<STAGES>(0, units, load_x);

    float sum[LINEAR_TILES][4] = {};
    for (int i = 0; i < units; i++) {
        advance_copies<STAGES>(i, units, [&](int next) {
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
                uint4 v = *(const uint4 *)(stage + place_for_lanes(PANEL_ROWS + n * 8 + g, piece));
                mma(sum[n], a.x, b.x, a.y, b.y, v.x, v.y);
                mma(sum[n], a.z, b.z, a.w, b.w, v.z, v.w);
            }
        }
        if ((first + i + 1) % steps && i + 1 < units) continue;

        int panel = (first + i) / steps, plane = blockIdx.x - panel * steps / share;
#pragma unroll
        for (int n = 0; n < LINEAR_TILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int token = n * 8 + t * 2 + j % 2, row = panel * PANEL_ROWS + warp * 16 + g + j / 2 * 8;
                if (token < tokens && row < rows) y[((size_t)plane * plane_tokens + token) * rows + row] = sum[n][j];
                sum[n][j] = 0;
            }
    }
}

/* y [tokens, rows] = x [tokens, inner] times the transposed weight [rows, inner], without tensor cores.
 *
 * One warp per weight row, whose lanes go along the row, for LINEAR_TOKENS tokens.
 * Grid: (rows / LINEAR_ROWS, tokens / LINEAR_TOKENS). Must read rows * inner weights once for LINEAR_TOKENS tokens. */
static_assert(LINEAR_THREADS == LINEAR_ROWS * WARP, "one warp per row");

extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, 1)
    linear(const Activation *x, WeightView weight, float *y, int tokens)
{
    wait_for_previous();
    let_next_start();
    int rows = weight.rows, inner = weight.inner;
    int row = blockIdx.x * LINEAR_ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = blockIdx.y * LINEAR_TOKENS, count = min(LINEAR_TOKENS, tokens - first);
    if (row >= rows) return;
    const WeightValue *of_row = weight.data() + (size_t)row * inner;
    x += (size_t)first * inner;
    float sum[LINEAR_TOKENS] = {};
    for (int i = lane; i < inner; i += WARP) {
        float w = widen(of_row[i]);
        /* Past the last token its loads are repeated: with a condition each load would wait for the one before. */
#pragma unroll
        for (int t = 0; t < LINEAR_TOKENS; t++) sum[t] += w * widen(x[(size_t)min(t, count - 1) * inner + i]);
    }
#pragma unroll
    for (int t = 0; t < LINEAR_TOKENS; t++) {
        float total = warp_sum(sum[t]);
        if (lane == 0 && t < count) y[(size_t)(first + t) * rows + row] = total;
    }
}

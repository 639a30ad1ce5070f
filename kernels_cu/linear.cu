/* y [tokens, rows] = x [tokens, inner] times weight [rows, inner] transposed.
 *
 * Plain: a warp a weight row, 16 tokens at a time; lanes go along the row.
 * Grid: (rows / 8, tokens / 16), 256 threads. Must move rows * inner weights once for 16 tokens. */
#define LINEAR_TOKENS 16

extern "C" __global__ void linear(const Held *x, const Held *weight, float *y, int tokens, int rows, int inner)
{
    wait_for_previous();
    let_next_start();
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = blockIdx.y * LINEAR_TOKENS, count = min(LINEAR_TOKENS, tokens - first);
    if (row >= rows) return;
    float sum[LINEAR_TOKENS] = {};
    for (int i = lane; i < inner; i += WARP) {
        float w = widen(weight[(size_t)row * inner + i]);
#pragma unroll
        for (int t = 0; t < LINEAR_TOKENS; t++)
            if (t < count) sum[t] += w * widen(x[(size_t)(first + t) * inner + i]);
    }
#pragma unroll
    for (int t = 0; t < LINEAR_TOKENS; t++) {
        float total = warp_sum(sum[t]);
        if (lane == 0 && t < count) y[(size_t)(first + t) * rows + row] = total;
    }
}

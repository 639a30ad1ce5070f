/* Each expert's matmul of its rows, without tensor cores (experts/gated.cuh): x [tokens, inner] with GATED, whose
 * results are y [places, rows / 2] in the order of the list; else x is those, and y planes [slots, tokens, rows].
 *
 * One warp per result, whose lanes go along the row of weights, for the LINEAR_TOKENS places of an item.
 * Compiled with GATED. Grid: (results / LINEAR_ROWS, items at most). Must read the weights of experts that have rows.
 */
extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, 1)
    experts_linear(const Activation *x, WeightView weight, Output *y, RoutingView routing)
{
    wait_for_previous();
    let_next_start();
    int rows = weight.rows, inner = weight.inner, outputs = outputs_of(rows);
    int output = blockIdx.x * LINEAR_ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (blockIdx.y >= *routing.item_count || output >= outputs) return;
    ExpertItem item = routing.item(blockIdx.y);
    const WeightValue *of_expert = weight.data() + (size_t)item.expert * rows * inner;
    const Activation *from[LINEAR_TOKENS];
#pragma unroll
    for (int t = 0; t < LINEAR_TOKENS; t++) { /* past the last place, the last one again: as in linear */
        int row = item.first + min(t, item.count - 1);
        from[t] = x + (size_t)(GATED ? routing.token(row) : row) * inner;
    }
    float sum[GATED + 1][LINEAR_TOKENS] = {};
    for (int i = lane; i < inner; i += WARP) {
        float w[GATED + 1];
#pragma unroll
        for (int n = 0; n <= GATED; n++) w[n] = widen(of_expert[(size_t)(output + n * outputs) * inner + i]);
#pragma unroll
        for (int t = 0; t < LINEAR_TOKENS; t++) {
            float value = widen(from[t][i]);
#pragma unroll
            for (int n = 0; n <= GATED; n++) sum[n][t] += w[n] * value;
        }
    }
#pragma unroll
    for (int t = 0; t < LINEAR_TOKENS; t++) {
        float total = warp_sum(sum[0][t]);
#if GATED
        total = silu(total) * warp_sum(sum[1][t]);
        if (lane == 0 && t < item.count) y[(size_t)(item.first + t) * outputs + output] = narrow<Output>(total);
#else
        if (lane || t >= item.count) continue;
        int place = routing.places[item.first + t];
        y[routing.row_of_planes(place) * rows + output] = total * routing.weights[place];
#endif
    }
}

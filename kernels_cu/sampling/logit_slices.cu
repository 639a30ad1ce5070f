/* What sample.cu needs to know of each slice of the proposing rows' logits, and for temperatures above 0 the logits as
 * one array.
 *
 * Logits are those of some proposing rows, from `first_row` on, as are slices [tokens, slices] of Row and kept [tokens,
 * vocab] or null. The mask token never counts.
 *
 * Grid: (slices, tokens); thread block (s, i) takes a slice of the logits of proposing row first_row + i, if there are
 * more than so many by *proposed_count. Must read the logits once. */
extern "C" __global__ void __launch_bounds__(SLICE_THREADS)
    logit_slices(MatmulView logits, BatchView batch, int first_row, Row *slices, float *kept)
{
    let_next_start();
    __shared__ Row warps[SLICE_THREADS / WARP];
    wait_for_previous();
    int index = first_row + blockIdx.y;
    if (index >= *batch.proposed_count) return;
    int row = batch.logits[index] - first_row, mask_token = batch.mask_token[index], vocab = logits.rows;
    int size = (vocab + gridDim.x * 4 - 1) / (gridDim.x * 4) * 4;
    int first = blockIdx.x * size, last = min(first + size, vocab);
    float temperature = batch.temperature[index];
    if (temperature == 0) temperature = 1;

    float top = -INFINITE;
    int token = vocab, sound = 1;
    extern __shared__ float values[];
    for (int i = first + threadIdx.x * 4; i < last; i += blockDim.x * 4) {
        float four[4];
        if (vocab % 4 == 0)
            *(float4 *)four = logits.at<float4>(row, i);
        else
            for (int j = 0; j < 4; j++) four[j] = i + j < last ? logits.at<float>(row, i + j) : -INFINITE;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float logit = i + j == mask_token ? -INFINITE : four[j];
            if (i + j >= last) break;
            values[i + j - first] = logit;
            if (kept) kept[(size_t)row * vocab + i + j] = logit;
            sound &= logit == logit;
            if (logit > top) top = logit, token = i + j;
        }
    }
    float total = 0, moment = 0; /* of this thread's logits, relative to the highest of them */
    for (int i = first + threadIdx.x * 4; i < last; i += blockDim.x * 4)
        for (int j = i; j < min(i + 4, last); j++) {
            float x = values[j - first] - top;
            if (temperature != 1) x /= temperature;
            float weight = top == -INFINITE ? 0.0f : expf(x);
            total += weight;
            if (weight > 0) moment += weight * x;
        }
    Row mine = {top, token, sound, total, moment};
    join_warp(mine, temperature);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = mine;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < blockDim.x / WARP; warp++) join(mine, warps[warp], temperature);
    slices[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = mine;
}

/* sum = x + delta, y = sum / rms(sum) * gain, narrowed for the matmul that follows; all [tokens, hidden], hidden a
 * multiple of 4. Without planes in delta, sum = x. The previous kernel does not write x.
 *
 * There are fewer thread blocks than SMs: asking for one per SM leaves registers for the loads of several planes to be
 * in flight together, without which a pass of 28 layers takes 4% longer.
 *
 * Grid: one thread block per token; NORM_CHANNEL_BYTES * hidden bytes of dynamic shared memory. Must read x and delta
 * and write sum and y once. */
static_assert(NORM_CHANNEL_BYTES == 2 * sizeof(float), "a row and its gains");

extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS, 1)
    add_rms_norm(const float *x, MatmulView delta, const float *gain, float *sum, Activation *y, int hidden, float eps)
{
    let_next_start();
    __shared__ float shared[WARP];
    extern __shared__ float4 row[];
    int token = blockIdx.x;
    size_t first = (size_t)token * hidden;
    float4 *gains = row + hidden / 4;
    if (!delta.planes) wait_for_previous();
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        row[i] = *(const float4 *)(x + first + i * 4);
        gains[i] = *(const float4 *)(gain + i * 4);
    }
    wait_for_previous();
    float square = 0;
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        float4 value = row[i];
        if (delta.planes) accumulate(value, delta.at<float4>(token, i * 4));
        *(float4 *)(sum + first + i * 4) = row[i] = value;
        square += dot(value, value);
    }
    float scale = inverse_rms(block_sum(square, shared, blockDim.x / WARP) / hidden, eps);
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x)
        store4(y + first + i * 4, times(scaled(row[i], scale), gains[i]));
}

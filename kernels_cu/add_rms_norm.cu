/* sum = x + delta, y = sum / rms(sum) * gain; all [tokens, hidden]. delta may be null: sum = x.
 * Grid: a block a token. Moves x and delta in, sum and y out. */
extern "C" __global__ void add_rms_norm(const float *x, const float *delta, const float *gain, float *sum,
                                        float *y, int hidden, float eps)
{
    __shared__ float shared[WARP];
    size_t first = (size_t)blockIdx.x * hidden;
    float square = 0;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        float value = x[first + i] + (delta ? delta[first + i] : 0.0f);
        sum[first + i] = value;
        square += value * value;
    }
    float scale = rsqrtf(block_sum(square, shared) / hidden + eps);
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) y[first + i] = sum[first + i] * scale * gain[i];
}

/* sum = x + delta, y = sum / rms(sum) * gain, narrowed for the product that follows; all
 * [tokens, hidden], hidden a multiple of 4. delta is a product, or of no values: sum = x then. x is not the
 * previous kernel's. Grid: a block a token; dynamic shared memory for 2 * hidden floats. Moves x and delta
 * in, sum and y out. */
extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const float *x, PRODUCT_PARAMETERS, const float *gain, float *sum, Held *y, int hidden, float eps)
{
    let_next_start();
    __shared__ float shared[WARP];
    extern __shared__ float4 row[];
    Product delta = PRODUCT;
    int token = blockIdx.x;
    size_t first = (size_t)token * hidden;
    float4 *gains = row + hidden / 4;
    if (!delta.values) wait_for_previous();
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        row[i] = *(const float4 *)(x + first + i * 4);
        gains[i] = *(const float4 *)(gain + i * 4);
    }
    wait_for_previous();
    float square = 0;
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        float4 value = row[i];
        if (delta.values) {
            float4 more = delta.at4(token, i * 4);
            value.x += more.x, value.y += more.y, value.z += more.z, value.w += more.w;
        }
        *(float4 *)(sum + first + i * 4) = row[i] = value;
        square += value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
    }
    float scale = inverse_rms(block_sum(square, shared) / hidden, eps);
    for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x) {
        float4 value = row[i], factor = gains[i];
        Held *to = y + first + i * 4;
        to[0] = narrow(value.x * scale * factor.x);
        to[1] = narrow(value.y * scale * factor.y);
        to[2] = narrow(value.z * scale * factor.z);
        to[3] = narrow(value.w * scale * factor.w);
    }
}

/* From the joined projections qkv [tokens, (heads + 2 * kv_heads) * head_dim] to
 * q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]: RMS norm of each q and k head
 * with its gain [head_dim], then rotation to the position length + token.
 *
 * Grid: (tokens, heads + 2 * kv_heads), head_dim / 2 threads rounded up to a warp: a thread turns
 * channels d and d + head_dim / 2. Moves qkv in and out. `frequencies` [head_dim / 2] in half turns per
 * position, double: a float's angle is off by 1e-2 at position 100,000. Of half turns whole ones can be taken off
 * exactly; an angle in radians would need a table in local memory for that. */
extern "C" __global__ void split_heads(PRODUCT_PARAMETERS, const float *q_gain, const float *k_gain,
                                       const double *frequencies, float rope_factor, const int *length,
                                       float *q, float *k, float *v, int heads, int kv_heads, int head_dim,
                                       float eps)
{
    __shared__ float shared[WARP];
    Product qkv = PRODUCT;
    int token = blockIdx.x, head = blockIdx.y, d = threadIdx.x, half = head_dim / 2;
    bool query = head < heads, value = head >= heads + kv_heads, there = d < half;
    float sine = 0, cosine = 0, first_gain = 0, second_gain = 0;
    if (!value && there) {
        double angle = (double)(*length + token) * frequencies[d];
        sincospif((float)(angle - 2 * rint(angle / 2)), &sine, &cosine);
        sine *= rope_factor, cosine *= rope_factor;
        const float *gain = query ? q_gain : k_gain;
        first_gain = gain[d], second_gain = gain[d + half];
    }
    wait_for_previous();
    float first = there ? qkv.at(token, head * head_dim + d) : 0.0f;
    float second = there ? qkv.at(token, head * head_dim + d + half) : 0.0f;
    let_next_start();
    float *to = query   ? q + ((size_t)token * heads + head) * head_dim
                : value ? v + ((size_t)token * kv_heads + head - heads - kv_heads) * head_dim
                        : k + ((size_t)token * kv_heads + head - heads) * head_dim;
    if (!value) {
        float scale = inverse_rms(block_sum(first * first + second * second, shared) / head_dim, eps);
        float a = first * scale * first_gain, b = second * scale * second_gain;
        first = a * cosine - b * sine;
        second = b * cosine + a * sine;
    }
    if (there) {
        to[d] = first;
        to[d + half] = second;
    }
}

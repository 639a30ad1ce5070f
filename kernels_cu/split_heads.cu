/* From the joined projections qkv [tokens, heads + 2 * kv_heads, head_dim] to
 * q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]: RMS norm of each q and k head
 * with its gain [head_dim], then rotation to the position length + token.
 *
 * Grid: (tokens, heads + 2 * kv_heads), head_dim / 2 threads rounded up to a warp: a thread turns
 * channels d and d + head_dim / 2. Moves qkv in and out. `frequencies` [head_dim / 2] in radians per
 * position, double: a float's angle is off by 1e-2 at position 100,000. */
extern "C" __global__ void split_heads(const float *qkv, const float *q_gain, const float *k_gain,
                                       const double *frequencies, float rope_factor, const int *length,
                                       float *q, float *k, float *v, int heads, int kv_heads, int head_dim,
                                       float eps)
{
    __shared__ float shared[WARP];
    int token = blockIdx.x, head = blockIdx.y, d = threadIdx.x, half = head_dim / 2;
    const float *from = qkv + ((size_t)token * (heads + 2 * kv_heads) + head) * head_dim;
    float first = d < half ? from[d] : 0.0f, second = d < half ? from[d + half] : 0.0f;
    float *to;
    if (head >= heads + kv_heads) {
        to = v + ((size_t)token * kv_heads + head - heads - kv_heads) * head_dim;
    } else {
        bool query = head < heads;
        const float *gain = query ? q_gain : k_gain;
        to = query ? q + ((size_t)token * heads + head) * head_dim
                   : k + ((size_t)token * kv_heads + head - heads) * head_dim;
        float scale = rsqrtf(block_sum(first * first + second * second, shared) / head_dim + eps);
        if (d < half) {
            double sine, cosine;
            sincos((double)(*length + token) * frequencies[d], &sine, &cosine);
            float s = (float)sine * rope_factor, c = (float)cosine * rope_factor;
            float a = first * scale * gain[d], b = second * scale * gain[d + half];
            first = a * c - b * s;
            second = b * c + a * s;
        }
    }
    if (d < half) {
        to[d] = first;
        to[d + half] = second;
    }
}

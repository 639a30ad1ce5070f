/* Attention of a block's tokens over the block's own keys and values, k and v [tokens, kv_heads,
 * head_dim], all to all, merged with the parts of attention over the prefix.
 *
 * With `kept_o` [tokens, heads, head_dim] and `kept_lse` [tokens, heads] the parts are of some tokens only, fresh
 * [fresh_count], negative ones of none (null: all tokens): their merged results are written there, and those of the
 * other tokens are read there.
 *
 * q [tokens, heads, head_dim]; o alike, narrowed for the product that follows. q, k and v are read before
 * the wait: the previous kernel is prefix attention or what follows it, which has waited for them. Grid:
 * (tokens, heads), a thread a channel, `tokens` floats of dynamic shared memory. A row by itself is little
 * work: what matters is that many are under way. Moves the parts in, and each kv head's keys and values once
 * a row, from the cache of the device. */
extern "C" __global__ void block_attention(const float *q, const float *k, const float *v, PARTS_PARAMETERS,
                                           const int *fresh, int fresh_count, float *kept_o, float *kept_lse,
                                           Held *o, int tokens, int kv_heads, int head_dim)
{
    extern __shared__ float scores[];
    int heads = gridDim.y, kv_head = blockIdx.y / (heads / kv_heads), lane = threadIdx.x % WARP;
    size_t row = (size_t)blockIdx.x * heads + blockIdx.y, stride = (size_t)kv_heads * head_dim;
    int channel = min((int)threadIdx.x, head_dim - 1);
    float scale = rsqrtf((float)head_dim);
#pragma unroll 4
    for (int j = threadIdx.x / WARP; j < tokens; j += blockDim.x / WARP) {
        float score = 0;
        const float *key = k + j * stride + kv_head * head_dim;
        for (int d = lane; d < head_dim; d += WARP) score += q[row * head_dim + d] * key[d];
        score = warp_sum(score);
        if (lane == 0) scores[j] = score * scale;
    }
    __syncthreads();
    float top = -INFINITE, total = 0, sum = 0;
    for (int j = 0; j < tokens; j++) top = fmaxf(top, scores[j]);
#pragma unroll 8
    for (int j = 0; j < tokens; j++) {
        float weight = expf(scores[j] - top);
        total += weight;
        sum += weight * v[j * stride + kv_head * head_dim + channel];
    }

    wait_for_previous();
    int of_parts = blockIdx.x, parts_tokens = gridDim.x;
    if (kept_o && fresh) {
        int found = -1;
        for (int i = lane; i < fresh_count; i += WARP)
            if (fresh[i] == (int)blockIdx.x) found = i;
        of_parts = __reduce_max_sync(~0u, found), parts_tokens = fresh_count;
    }
    float prefix_top, prefix_total, prefix_sum;
    if (of_parts >= 0) {
        Parts parts = PARTS_OF((size_t)parts_tokens * heads);
        parts.merge((size_t)of_parts * heads + blockIdx.y, channel, head_dim, prefix_top, prefix_total, prefix_sum);
        if (kept_o) store_merged(kept_o, kept_lse, row, channel, head_dim, prefix_top, prefix_total, prefix_sum);
    } else {
        prefix_top = kept_lse[row], prefix_total = 1, prefix_sum = kept_o[row * head_dim + channel];
    }
    let_next_start();
    /* Over an empty prefix the maximum is -inf. */
    float both = fmaxf(top, prefix_top), mine = expf(top - both), theirs = expf(prefix_top - both);
    o[row * head_dim + channel] =
        narrow((sum * mine + prefix_sum * theirs) / (total * mine + prefix_total * theirs));
}

/* Attention of a block's tokens over the block's own keys and values, k and v [tokens, kv_heads,
 * head_dim], all to all, merged with the attention over the prefix.
 *
 * o_prefix [tokens, heads, head_dim] and lse_prefix [tokens, heads] become part of
 * o [tokens, heads, head_dim]. Grid: (kv_heads, rows / ROWS). Moves little. */
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    block_attention(const float *q, const float *k, const float *v, const float *o_prefix,
                    const float *lse_prefix, float *o, int tokens, int heads, int kv_heads, int dim)
{
    extern __shared__ float shared[];
    __shared__ int limit[ROWS];
    int kv_head = blockIdx.x, group = heads / kv_heads, rows = tokens * group;
    float *queries = shared, scale = rsqrtf((float)dim);
    if (threadIdx.x < ROWS) limit[threadIdx.x] = tokens;
    for (int i = threadIdx.x; i < ROWS * dim; i += blockDim.x) {
        int row = blockIdx.y * ROWS + i / dim;
        size_t at = ((size_t)(row / group) * heads + kv_head * group + row % group) * dim + i % dim;
        queries[i] = row < rows ? q[at] * scale : 0.0f;
    }
    Rows state;
    attend(state, queries, limit, 0, tokens, dim, shared + ROWS * dim, [&](int value, int position) {
        return (value ? v : k) + ((size_t)position * kv_heads + kv_head) * dim;
    });
    for (int r = 0; r < ROWS_OF_WARP; r++) {
        int row = blockIdx.y * ROWS + threadIdx.x / WARP * ROWS_OF_WARP + r, lane = threadIdx.x % WARP;
        if (row >= rows) break;
        size_t at = (size_t)(row / group) * heads + kv_head * group + row % group;
        /* The block is never empty; the prefix may be, with a log-sum-exp of -inf. */
        float lse_block = state.top[r] + logf(state.total[r]), top = fmaxf(lse_prefix[at], lse_block);
        float prefix = expf(lse_prefix[at] - top), block = expf(lse_block - top);
        float total = prefix + block;
        for (int i = 0; i < CHANNELS_OF_LANE; i++) {
            int d = lane + i * WARP;
            if (d < dim)
                o[at * dim + d] =
                    (o_prefix[at * dim + d] * prefix + state.o[r][i] / state.total[r] * block) / total;
        }
    }
}

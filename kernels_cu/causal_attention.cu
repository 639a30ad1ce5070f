/* Block-causal attention of a piece of the prompt, positions length, length + 1, ..., whose keys and
 * values are in the cache: a token sees all positions up to the end of its own block.
 * q and o [tokens, heads, head_dim]. Grid: (kv_heads, rows / ROWS). */
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    causal_attention(const float *q, CACHE_PARAMETERS, float *o, int tokens, int heads, int block_length)
{
    CacheView cache = CACHE_VIEW;
    extern __shared__ float shared[];
    __shared__ int limit[ROWS];
    int kv_head = blockIdx.x, group = heads / cache.kv_heads, dim = cache.head_dim, rows = tokens * group;
    int first_row = blockIdx.y * ROWS, last_row = min(first_row + ROWS, rows) - 1;
    float *queries = shared, scale = rsqrtf((float)dim);
    if (threadIdx.x < ROWS) {
        int position = *cache.length + min(first_row + (int)threadIdx.x, last_row) / group;
        limit[threadIdx.x] = (position / block_length + 1) * block_length;
    }
    for (int i = threadIdx.x; i < ROWS * dim; i += blockDim.x) {
        int row = first_row + i / dim;
        size_t at = ((size_t)(row / group) * heads + kv_head * group + row % group) * dim + i % dim;
        queries[i] = row < rows ? q[at] * scale : 0.0f;
    }
    __syncthreads();
    Rows state;
    attend(state, queries, limit, 0, limit[ROWS - 1], dim, shared + ROWS * dim,
           [&](int value, int position) { return cache.row(value, kv_head, position); });
    for (int r = 0; r < ROWS_OF_WARP; r++) {
        int row = first_row + threadIdx.x / WARP * ROWS_OF_WARP + r, lane = threadIdx.x % WARP;
        if (row >= rows) break;
        size_t at = ((size_t)(row / group) * heads + kv_head * group + row % group) * dim;
        for (int i = 0; i < CHANNELS_OF_LANE; i++)
            if (lane + i * WARP < dim) o[at + lane + i * WARP] = state.o[r][i] / state.total[r];
    }
}

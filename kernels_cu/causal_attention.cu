/* Block-causal attention of a piece of the prompt, positions length, length + 1, ..., whose keys and
 * values are in the cache: a token sees all positions up to the end of its own block.
 * q [tokens, heads, head_dim]; o alike, narrowed for the product that follows. Grid: (kv_heads, rows / ROWS). */
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    causal_attention(const float *q, CACHE_PARAMETERS, Held *o, int tokens, int heads, int block_length)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ float shared[];
    __shared__ int limit[ROWS];
    int kv_head = blockIdx.x, group = heads / cache.kv_heads, dim = cache.head_dim, rows = tokens * group;
    int first_row = blockIdx.y * ROWS, last_row = min(first_row + ROWS, rows) - 1;
    if (threadIdx.x < ROWS) {
        int position = *cache.length + min(first_row + (int)threadIdx.x, last_row) / group;
        limit[threadIdx.x] = (position / block_length + 1) * block_length;
    }
    load_queries(shared, q, nullptr, first_row, rows, kv_head, group, heads, dim);
    __syncthreads();
    Rows state;
    attend(state, shared, limit, 0, limit[ROWS - 1], cache, Whole(), kv_head, shared + ROWS * dim);
    for (int r = 0; r < ROWS_OF_WARP; r++) {
        int row = first_row + threadIdx.x / WARP * ROWS_OF_WARP + r, lane = threadIdx.x % WARP;
        if (row >= rows) break;
        size_t at = ((size_t)(row / group) * heads + kv_head * group + row % group) * dim;
        for (int i = 0; i < CHANNELS_OF_LANE; i++)
            if (lane + i * WARP < dim) o[at + lane + i * WARP] = narrow(state.o[r][i] / state.total[r]);
    }
}

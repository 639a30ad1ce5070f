/* Block-causal attention of a piece of the prompt, positions length, length + 1, ..., whose keys and values are in the
 * cache already: a token sees all positions up to the end of its own block. q [tokens, heads, head_dim]; o alike,
 * narrowed for the matmul that follows.
 *
 * Grid: (kv_heads, rows / PLAIN_ROWS). Must do 4 * head_dim * heads operations per token and position that it sees. */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    causal_attention(const float *q, CacheView cache, Activation *o, int tokens, int heads, int block_length)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    __shared__ int limit[PLAIN_ROWS];
    int kv_head = blockIdx.x, group = heads / cache.kv_heads, dim = cache.head_dim, rows = tokens * group;
    int first_row = blockIdx.y * PLAIN_ROWS, last_row = min(first_row + PLAIN_ROWS, rows) - 1;
    if (threadIdx.x < PLAIN_ROWS) {
        int position = *cache.length + min(first_row + (int)threadIdx.x, last_row) / group;
        limit[threadIdx.x] = (position / block_length + 1) * block_length;
    }
    load_queries(shared, q, nullptr, first_row, rows, kv_head, group, heads, dim);
    __syncthreads();
    PlainRows state;
    attend(state, shared, limit, 0, limit[PLAIN_ROWS - 1], cache, WholePrefix(), kv_head, shared + PLAIN_ROWS * dim);
    each_row(first_row, rows, [&](int r, int row) {
        size_t at = query_row(row, kv_head, group, heads) * dim;
        int lane = threadIdx.x % WARP;
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane + i * WARP < dim) o[at + lane + i * WARP] = narrow<Activation>(state.o[r][i] / state.total[r]);
    });
}

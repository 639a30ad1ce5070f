/* Block-causal attention of a piece of the prompt (causal_attention.cu) on tensor cores.
 *
 * Compiled with KEY_WARPS = 1. Grid: (rows / BLOCK_ROWS, kv_heads); the last rows, which see most, come
 * first. Must do 4 * head_dim * heads operations for each token and position that it sees. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    causal_attention_tensor(const float *q, CACHE_PARAMETERS, Held *o, int tokens, int heads, int block_length)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    int kv_head = blockIdx.y, group = heads / cache.kv_heads, rows = tokens * group, length = *cache.length;
    int first_row = (gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS, last_row = min(first_row + BLOCK_ROWS, rows) - 1;
    auto limit = [&](int row) { return ((length + min(row, last_row) / group) / block_length + 1) * block_length; };
    TensorRows state;
    int tiles = (limit(last_row) + TILE - 1) / TILE;
    attend(state, cache, Whole(), kv_head, 0, tiles, limit(first_row) / TILE, shared_address(shared_bytes), [&]() {
        load_queries(state, q, nullptr, first_row, rows, kv_head, group, heads);
#pragma unroll
        for (int half = 0; half < 2; half++) state.limit[half] = limit(state.row[half]);
    });

    int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = state.row[half];
        if (row >= rows) continue;
        unsigned *to = (unsigned *)(o + ((size_t)(row / group) * heads + kv_head * group + row % group) * HEAD_DIM);
        float factor = 1.0f / state.total[half];
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
            to[d * 4 + t] = pack(state.sum[d][half * 2] * factor, state.sum[d][half * 2 + 1] * factor);
    }
}

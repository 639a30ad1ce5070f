/* causal_attention.cu on tensor cores.
 *
 * Compiled with KEY_WARPS = 1. Grid: (rows / BLOCK_ROWS, kv_heads, parts); the last rows, which see most, come first.
 * Must do 4 * head_dim * heads operations per token and position that it sees. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    causal_attention_tensor(const float *q, CachesView caches, Activation *o, PartsView parts, int tokens, int heads,
                            int block_length)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    CacheView cache = caches.of(0);
    int kv_head = blockIdx.y, length = *cache.length;
    QueryRows rows((gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS, tokens, kv_head, heads, cache);
    int last_row = min(rows.first + BLOCK_ROWS, rows.count) - 1;
    auto limit = [&](int row) { return rows.causal_limit(min(row, last_row), length, block_length); };
    TensorRows state;
    TileRange tiles = tiles_of_part((limit(last_row) + TENSOR_TILE - 1) / TENSOR_TILE, blockIdx.z, gridDim.z);
    attend(state, cache, WholePrefix(), kv_head, tiles.first, tiles.last, limit(rows.first) / TENSOR_TILE,
           shared_address(shared_bytes), [&]() {
               load_queries(state, q, nullptr, rows);
#pragma unroll
               for (int half = 0; half < 2; half++) state.limit[half] = limit(state.row[half]);
           });
    if (gridDim.z == 1)
        write_rows(state, o, rows);
    else
        write_part(state, (float *)shared_bytes, parts, blockIdx.z, rows);
}

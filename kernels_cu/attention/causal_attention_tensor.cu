/* causal_attention.cu on tensor cores.
 *
 * Compiled with KEY_WARPS = 1. Grid: (rows / BLOCK_ROWS, kv_heads); the last rows, which see most, come first. Must do
 * 4 * head_dim * heads operations per token and position that it sees. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    causal_attention_tensor(const float *q, CacheView cache, Activation *o, int tokens, int heads, int block_length)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    int kv_head = blockIdx.y, group = heads / cache.kv_heads, rows = tokens * group, length = *cache.length;
    int first_row = (gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS, last_row = min(first_row + BLOCK_ROWS, rows) - 1;
    auto limit = [&](int row) { return ((length + min(row, last_row) / group) / block_length + 1) * block_length; };
    TensorRows state;
    int tiles = (limit(last_row) + TENSOR_TILE - 1) / TENSOR_TILE;
    attend(state, cache, WholePrefix(), kv_head, 0, tiles, limit(first_row) / TENSOR_TILE, shared_address(shared_bytes),
           [&]() {
               load_queries(state, q, nullptr, first_row, rows, kv_head, group, heads);
#pragma unroll
               for (int half = 0; half < 2; half++) state.limit[half] = limit(state.row[half]);
           });
    write_rows(state, o, rows, kv_head, group, heads);
}

/* prefix_attention.cu on tensor cores; one part per thread block.
 *
 * Grid: (kv_heads, parts, rows / BLOCK_ROWS). Since up to 128 rows of a kv head are in one thread block, keys and
 * values are read once: 2 * kv_heads * length * head_dim, which must be read. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefix_attention_tensor(const float *q, CacheView cache, PartsView parts, int heads)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    int kv_head = blockIdx.x, part = blockIdx.y, length = *cache.length;
    QueryRows rows(blockIdx.z * BLOCK_ROWS, parts.tokens, kv_head, heads, cache);
    TileRange tiles = tiles_of_part((length + TENSOR_TILE - 1) / TENSOR_TILE, part, gridDim.y);
    TensorRows state;
    state.limit[0] = state.limit[1] = length;
    /* The prefix was complete before the pass began. */
    attend(state, cache, WholePrefix(), kv_head, tiles.first, tiles.last, length / TENSOR_TILE,
           shared_address(shared_bytes), [&]() {
               wait_for_previous();
               let_next_start();
               load_queries(state, q, nullptr, rows);
           });
    write_part(state, (float *)shared_bytes, parts, part, rows);
}

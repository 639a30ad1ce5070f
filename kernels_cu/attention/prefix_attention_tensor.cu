/* prefix_attention.cu on tensor cores; one part per thread block.
 *
 * Grid: (kv_heads, parts, rows / BLOCK_ROWS). Since up to 128 rows of a kv head are in one thread block, keys and
 * values are read once: 2 * kv_heads * length * head_dim, which must be read. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefix_attention_tensor(const float *q, CachesView caches, PartsView parts, const int *owners, const int *rides,
                            int heads, int per_cache, int block_tokens)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    int kv_head = blockIdx.x;
    PrefixPart mine(parts, owners);
    if (mine.cache < 0) return;
    CacheBlocks blocks(mine.cache, rides, per_cache);
    CacheView cache = caches.of(blocks.first);
    q += (size_t)blocks.first * block_tokens * heads * HEAD_DIM;
    QueryRows rows(blockIdx.z * BLOCK_ROWS, blocks.count * block_tokens, kv_head, heads, cache);
    if (rows.first >= rows.count) return; /* a cache with two blocks has more */
    Prefixes prefixes(cache, rows, blocks.count);
    TileRange tiles = tiles_of_part((prefixes.all + TENSOR_TILE - 1) / TENSOR_TILE, mine.part, mine.parts);
    TensorRows state;
    if (!prefixes.committed(tiles.last * TENSOR_TILE)) wait_for_previous();
    attend(state, cache, WholePrefix(), kv_head, tiles.first, tiles.last, prefixes.first / TENSOR_TILE,
           shared_address(shared_bytes), [&]() {
               wait_for_previous();
               let_next_start();
               load_queries(state, q, nullptr, rows);
               state.limit[0] = prefixes.limit(state.row[0]), state.limit[1] = prefixes.limit(state.row[1]);
           });
    write_part(state, (float *)shared_bytes, parts, blockIdx.y, rows);
}

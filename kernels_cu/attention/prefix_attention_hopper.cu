/* prefix_attention.cu by wgmma; one part per thread block.
 *
 * Compiled with COPY_THREADS = 32: registers are left for the thread blocks of the next kernel; over codes with TILE =
 * 64 and COPY_THREADS = 128, and for few rows WARPGROUP_ROWS = 16 or 32. Grid: (kv_heads, parts, rows / BLOCK_ROWS).
 * Since up to 128 rows of a kv head are in one thread block, keys and values are read once: 2 * kv_heads * length *
 * head_dim, of codes with their scales, which must be read. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefix_attention_hopper(const float *q, CachesView caches, PartsView parts, const int *owners, const int *rides,
                            int heads, int per_cache, int block_tokens)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) float shared[];
    Stages stages = {shared_address(shared)};
    int kv_head = blockIdx.x;
    PrefixPart mine(parts, owners);
    if (mine.cache < 0) return;
    CacheBlocks blocks(mine.cache, rides, per_cache);
    CacheView cache = caches.of(blocks.first);
    q += (size_t)blocks.first * block_tokens * heads * HEAD_DIM;
    QueryRows rows(blockIdx.z * BLOCK_ROWS, blocks.count * block_tokens, kv_head, heads, cache);
    if (rows.first >= rows.count) return; /* a cache with two blocks has more */
    Prefixes prefixes(cache, rows, blocks.count);
    TileRange tiles = tiles_of_part((prefixes.all + TILE - 1) / TILE, mine.part, mine.parts);
    prepare(stages);
    if (threadIdx.x >= COMPUTE_THREADS) {
        if (!prefixes.committed(tiles.last * TILE)) wait_for_previous();
        copy_tiles(stages, cache, kv_head, tiles.first, tiles.last);
    } else {
#if IS_CODED
        set_registers_up<240>();
        wait_for_previous();
        let_next_start();
        load_queries(stages, q, rows);
        CodedRows state = {};
        int first_row = rows.first + threadIdx.x / WARPGROUP / KEY_GROUPS * WARPGROUP_ROWS;
        attend(state, stages, tiles.first, tiles.last, prefixes.first / TILE,
               [&](int row) { return prefixes.limit(first_row + row); });
        write_part(state, shared, stages, parts, blockIdx.y, rows);
#else
        FragmentRows state;
        wait_for_previous();
        let_next_start();
        load_queries(state, stages, q, rows);
        state.limit[0] = prefixes.limit(state.row[0]), state.limit[1] = prefixes.limit(state.row[1]);
        attend(state, stages, tiles.first, tiles.last, prefixes.first / TILE);
        write_part(state, shared, parts, blockIdx.y, rows);
#endif
    }
}

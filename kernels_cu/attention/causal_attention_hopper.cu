/* causal_attention.cu by wgmma.
 *
 * Compiled with KEY_GROUPS = 1. Grid: (rows / BLOCK_ROWS, kv_heads, parts); the last rows, which see most, come first.
 * Must do 4 * head_dim * heads operations per token and position that it sees. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    causal_attention_hopper(const float *q, CachesView caches, Activation *o, PartsView parts, int tokens, int heads,
                            int block_length)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ __align__(SHARED_ALIGNMENT) float shared[];
    Stages stages = {shared_address(shared)};
    CacheView cache = caches.of(0);
    int kv_head = blockIdx.y, length = *cache.length;
    QueryRows rows((gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS, tokens, kv_head, heads, cache);
    int last_row = min(rows.first + BLOCK_ROWS, rows.count) - 1;
    auto limit = [&](int row) { return rows.causal_limit(min(row, last_row), length, block_length); };
    TileRange tiles = tiles_of_part((limit(last_row) + TILE - 1) / TILE, blockIdx.z, gridDim.z);
    prepare(stages);
    if (threadIdx.x >= COMPUTE_THREADS) {
        copy_tiles(stages, cache, kv_head, tiles.first, tiles.last);
    } else {
        FragmentRows state;
        load_queries(state, stages, q, rows);
#pragma unroll
        for (int half = 0; half < 2; half++) state.limit[half] = limit(state.row[half]);
        attend(state, stages, tiles.first, tiles.last, limit(rows.first) / TILE);
        if (gridDim.z == 1)
            write_rows(state, o, rows);
        else
            write_part(state, shared, parts, blockIdx.z, rows);
    }
}

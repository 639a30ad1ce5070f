/* Attention of a block's queries over the paged prefix on tensor cores, split over the prefix; parts
 * as those of prefix_attention.cu, one a thread block.
 *
 * Grid: (kv_heads, splits, rows / BLOCK_ROWS). Since all rows of a kv head are in one block (up to 128),
 * every key and value is read once. Must move 2 * kv_heads * length * head_dim values. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefix_attention_tensor(const float *q, CACHE_PARAMETERS, float *o, float *tops, float *totals, int tokens,
                            int heads)
{
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int rows = tokens * group, length = *cache.length, tiles = (length + TILE - 1) / TILE;
    int first = (int)((long long)tiles * part / parts), last = (int)((long long)tiles * (part + 1) / parts);
    int first_row = blockIdx.z * BLOCK_ROWS;
    TensorRows state;
    state.limit[0] = state.limit[1] = length;
    /* The prefix was there before the pass began. */
    attend(state, cache, Whole(), kv_head, first, last, length / TILE, shared_address(shared_bytes), [&]() {
        wait_for_previous();
        let_next_start();
        load_queries(state, q, nullptr, first_row, rows, kv_head, group, heads);
    });
    write_part(state, (float *)shared_bytes, part, first_row, rows, tokens, kv_head, group, heads, o, tops, totals);
}

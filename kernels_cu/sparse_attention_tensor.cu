/* sparse_attention.cu on tensor cores, parts alike: one a thread block.
 *
 * Grid: (kv_heads, splits, rows / BLOCK_ROWS). Must move the listed pages once: 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sparse_attention_tensor(const float *q, const int *tokens, CACHE_PARAMETERS, const int *ids, int capacity,
                            const int *counts, int page_size, float *o, float *tops, float *totals, int count,
                            int heads)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int rows = count * group, first_row = blockIdx.z * BLOCK_ROWS;
    ids += (size_t)kv_head * capacity;
    int listed = listed_positions(ids, counts[kv_head], page_size, *cache.length), tiles = (listed + TILE - 1) / TILE;
    int first = (int)((long long)tiles * part / parts), last = (int)((long long)tiles * (part + 1) / parts);
    TensorRows state;
    load_queries(state, q, tokens, first_row, rows, kv_head, group, heads);
    state.limit[0] = state.limit[1] = listed;
    attend(state, cache, Listed{ids, page_size}, kv_head, first, last, listed / TILE, shared_address(shared_bytes));
    write_part(state, (float *)shared_bytes, part, first_row, rows, count, kv_head, group, heads, o, tops, totals);
}

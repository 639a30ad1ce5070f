/* sparse_attention.cu on tensor cores, parts alike: one a thread block.
 *
 * Grid: (kv_heads, splits, rows / BLOCK_ROWS). Must move the listed pages once: 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sparse_attention_tensor(const float *q, const int *tokens, CACHE_PARAMETERS, PAGES_PARAMETERS, int capacity,
                            float *o, float *tops, float *totals, int count, int heads)
{
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    int kv_head = blockIdx.x, part = blockIdx.y, group = heads / cache.kv_heads;
    int rows = count * group, first_row = blockIdx.z * BLOCK_ROWS;
    int *list = (int *)(shared_bytes + STAGES * 2 * TILE_BYTES);
    int length = *cache.length;
    prefetch_selected(PAGES_CHOSEN, kv_head);
    wait_for_previous();
    let_next_start();
    PageShare share =
        share_pages(PAGES_CHOSEN, kv_head, tokens, count, group, length, page_size, TILE, list, capacity);
    if (part + blockIdx.z + threadIdx.x == 0) atomicAdd(positions_read, share.listed);
    TensorRows state;
    state.limit[0] = state.limit[1] = share.listed;
    auto load = [&]() { load_queries(state, q, tokens, first_row, rows, kv_head, group, heads); };
    attend(state, cache, share.where, kv_head, share.first, share.last, share.listed / TILE,
           shared_address(shared_bytes), load);
    write_part(state, (float *)shared_bytes, part, first_row, rows, count, kv_head, group, heads, o, tops, totals);
}

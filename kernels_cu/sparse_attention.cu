/* Attention of some tokens' queries over listed pages of the prefix, split over the list; parts as those of
 * prefix_attention.cu, of `count` tokens.
 *
 * q [all tokens, heads, head_dim]; tokens [count], negative ones are none and their rows of no use; null: all of
 * them. ids [kv_heads, capacity], rising, of which counts [kv_heads] are there: only the prefix's last page can
 * be part full, and it is the last of a list, so that a list is a prefix of its own.
 *
 * Grid: (kv_heads, splits, rows / ROWS). Must move the listed pages once: 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    sparse_attention(const float *q, const int *tokens, CACHE_PARAMETERS, const int *ids, int capacity,
                     const int *counts, int page_size, float *o, float *tops, float *totals, int count, int heads)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ float shared[];
    __shared__ int limit[ROWS];
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int dim = cache.head_dim, rows = count * group, first_row = blockIdx.z * ROWS;
    ids += (size_t)kv_head * capacity;
    int listed = listed_positions(ids, counts[kv_head], page_size, *cache.length), tiles = (listed + WARP - 1) / WARP;
    int first = (int)((long long)tiles * part / parts) * WARP;
    int last = min(listed, (int)((long long)tiles * (part + 1) / parts) * WARP);
    if (threadIdx.x < ROWS) limit[threadIdx.x] = listed;
    load_queries(shared, q, tokens, first_row, rows, kv_head, group, heads, dim);
    __syncthreads();
    Rows state;
    attend(state, shared, limit, first, last, cache, Listed{ids, page_size}, kv_head, shared + ROWS * dim);
    write_part(state, part, first_row, rows, count, kv_head, group, heads, dim, o, tops, totals);
}

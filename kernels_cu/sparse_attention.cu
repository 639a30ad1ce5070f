/* Attention of some tokens' queries over listed pages of the prefix, split over the list; parts as those of
 * prefix_attention.cu, of `count` tokens.
 *
 * q [all tokens, heads, head_dim]; tokens [count], negative ones are none and their rows of no use; null: all of
 * them. The positions listed are added to *positions_read.
 *
 * Grid: (kv_heads, splits, rows / ROWS). Must move the listed pages once: 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    sparse_attention(const float *q, const int *tokens, CACHE_PARAMETERS, PAGES_PARAMETERS, int capacity, float *o,
                     float *tops, float *totals, int count, int heads)
{
    CacheView cache = CACHE_VIEW;
    int length = *cache.length;
    prefetch_selected(PAGES_CHOSEN, blockIdx.x);
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    __shared__ int limit[ROWS];
    int kv_head = blockIdx.x, part = blockIdx.y, group = heads / cache.kv_heads, dim = cache.head_dim;
    int rows = count * group, first_row = blockIdx.z * ROWS;
    int *list = (int *)(shared + ROWS * dim + 2 * WARP * (dim + 1));
    PageShare share =
        share_pages(PAGES_CHOSEN, kv_head, tokens, count, group, length, page_size, WARP, list, capacity);
    if (part + blockIdx.z + threadIdx.x == 0) atomicAdd(positions_read, share.listed);
    if (threadIdx.x < ROWS) limit[threadIdx.x] = share.listed;
    load_queries(shared, q, tokens, first_row, rows, kv_head, group, heads, dim);
    __syncthreads();
    Rows state;
    attend(state, shared, limit, share.first * WARP, min(share.listed, share.last * WARP), cache, share.where, kv_head,
           shared + ROWS * dim);
    write_part(state, part, first_row, rows, count, kv_head, group, heads, dim, o, tops, totals);
}

/* Attention of some tokens' queries over a list of pages of the prefix, split over the list; its parts are those of
 * prefix_attention.cu, of parts.tokens tokens.
 *
 * q [all tokens, heads, head_dim]; tokens [parts.tokens], null: all; the rows of a negative token are undefined. Adds
 * to `reads` as count_reads does.
 *
 * Grid: (kv_heads, parts, rows / PLAIN_ROWS). Must read the listed pages once: 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    sparse_attention(const float *q, const int *tokens, CacheView cache, PagesView pages, int capacity, int *reads,
                     PartsView parts, int heads)
{
    int kv_head = blockIdx.x, part = blockIdx.y, length = *cache.length;
    const int *top = prefetch_top(pages, kv_head);
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    __shared__ int limit[PLAIN_ROWS];
    int dim = cache.head_dim;
    QueryRows rows(blockIdx.z * PLAIN_ROWS, parts.tokens, kv_head, heads, cache);
    int *list = (int *)(shared + PLAIN_ROWS * dim + 2 * WARP * (dim + 1));
    PageShare share = share_pages(pages, top, tokens, rows, length, cache.page_size, WARP, list, capacity);
    rows.count = share.active * rows.group;
    if (rows.first >= rows.count) return; /* nobody reads these parts */
    count_reads(reads, share);
    if (threadIdx.x < PLAIN_ROWS) limit[threadIdx.x] = share.listed;
    load_queries(shared, q, tokens, rows, dim);
    __syncthreads();
    PlainRows state;
    attend(state, shared, limit, share.tiles.first * WARP, min(share.listed, share.tiles.last * WARP), cache,
           share.where, kv_head, shared + PLAIN_ROWS * dim);
    write_part(state, parts, part, rows, dim);
}

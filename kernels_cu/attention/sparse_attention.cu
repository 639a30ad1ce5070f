/* Attention of some tokens' queries over a list of pages of their sequence's prefix, split over the list; its parts are
 * those of prefix_attention.cu, of parts.tokens tokens.
 *
 * q [sequences, sequence_tokens, heads, head_dim]; tokens [sequences, parts.tokens], null: all; the rows of a negative
 * token are undefined. Adds to reads [sequences, 2] as count_reads does.
 *
 * Grid: (kv_heads, parts, sequences * rows / PLAIN_ROWS). Must read the listed pages once: 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    sparse_attention(const float *q, const int *tokens, CachesView caches, PagesView pages, int capacity, int *reads,
                     PartsView parts, int heads, int sequence_tokens)
{
    SequenceRows mine(tokens, parts.tokens, heads / caches.kv_heads, PLAIN_ROWS);
    int kv_head = blockIdx.x, sequence = mine.sequence;
    CacheView cache = caches.of(sequence);
    const int *top = prefetch_top(pages, sequence, kv_head);
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    __shared__ int limit[PLAIN_ROWS];
    int dim = cache.head_dim;
    QueryRows rows(mine.first_row, parts.tokens, kv_head, heads, cache);
    q += (size_t)sequence * sequence_tokens * heads * dim;
    int *list = (int *)(shared + PLAIN_ROWS * dim + 2 * WARP * (dim + 1));
    PageShare share = share_pages(pages, top, mine.tokens, rows, sequence, cache, WARP, list, capacity);
    rows.count = share.active * rows.group;
    if (rows.first >= rows.count) return; /* nobody reads these parts */
    count_reads(reads + 2 * sequence, share, rows);
    if (threadIdx.x < PLAIN_ROWS) limit[threadIdx.x] = share.listed;
    load_queries(shared, q, mine.tokens, rows, dim);
    __syncthreads();
    PlainRows state;
    attend(state, shared, limit, share.tiles.first * WARP, min(share.listed, share.tiles.last * WARP), cache,
           share.where, kv_head, shared + PLAIN_ROWS * dim);
    write_part(state, parts, sequence * gridDim.y + blockIdx.y, rows, dim);
}

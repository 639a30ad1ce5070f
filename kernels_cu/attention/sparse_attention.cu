/* Attention of some tokens' queries over a list of pages of their sequence's prefix, split over the list; its parts are
 * those of prefix_attention.cu, of parts.tokens tokens. With `fixed` every list has that many parts, else as
 * share_of_block says, whose starts are left for the kernel that merges the parts.
 *
 * q [sequences, sequence_tokens, heads, head_dim]; tokens [sequences, parts.tokens], null: all; the rows of a negative
 * token are undefined. Adds to reads [sequences, 2] as count_reads does.
 *
 * Grid: (kv_heads, parts of all sequences, rows / PLAIN_ROWS). Must read the listed pages once:
 * 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    sparse_attention(const float *q, const int *tokens, CachesView caches, PagesView pages, int capacity, int *reads,
                     PartsView parts, int heads, int sequence_tokens, int sequences, int fixed)
{
    extern __shared__ float shared[];
    __shared__ int limit[PLAIN_ROWS];
    int kv_head = blockIdx.x, dim = caches.head_dim;
    int *list = (int *)(shared + PLAIN_ROWS * dim + 2 * WARP * (dim + 1));
    wait_for_previous();
    let_next_start();
    SequenceShare mine = share_of_block(tokens, parts.tokens, sequences, fixed, list, (int *)parts.first);
    int sequence = mine.sequence;
    if (sequence < 0) return;
    if (tokens) tokens += sequence * parts.tokens;
    CacheView cache = caches.of(sequence);
    const int *top = prefetch_top(pages, sequence, kv_head);
    QueryRows rows(blockIdx.z * PLAIN_ROWS, parts.tokens, kv_head, heads, cache);
    q += (size_t)sequence * sequence_tokens * heads * dim;
    PageShare share = share_pages(pages, top, tokens, rows, mine, cache, WARP, list, capacity);
    rows.count = share.active * rows.group;
    if (rows.first >= rows.count) return; /* nobody reads these parts */
    count_reads(reads + 2 * sequence, share, rows, mine.part);
    if (threadIdx.x < PLAIN_ROWS) limit[threadIdx.x] = share.listed;
    load_queries(shared, q, tokens, rows, dim);
    __syncthreads();
    PlainRows state;
    attend(state, shared, limit, share.tiles.first * WARP, min(share.listed, share.tiles.last * WARP), cache,
           share.where, kv_head, shared + PLAIN_ROWS * dim);
    write_part(state, parts, blockIdx.y, rows, dim);
}

/* sparse_attention.cu on tensor cores; one part per thread block.
 *
 * Grid: (kv_heads, parts of all sequences, rows / BLOCK_ROWS). Must read the listed pages once:
 * 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sparse_attention_tensor(const float *q, const int *tokens, CachesView caches, PagesView pages, int capacity,
                            int *reads, PartsView parts, int heads, int sequence_tokens, int sequences, int fixed)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    int kv_head = blockIdx.x, *list = (int *)(shared_bytes + STAGES * 2 * TILE_BYTES);
    if (!fixed) wait_for_previous(); /* for the tokens, and before the starts are written */
    SequenceShare mine = share_of_block(tokens, parts.tokens, sequences, fixed, list, (int *)parts.first);
    if (mine.sequence < 0) return;
    int sequence = mine.sequence;
    if (tokens) tokens += sequence * parts.tokens;
    CacheView cache = caches.of(sequence);
    QueryRows rows(blockIdx.z * BLOCK_ROWS, parts.tokens, kv_head, heads, cache);
    q += (size_t)sequence * sequence_tokens * heads * HEAD_DIM;
    const int *top = prefetch_top(pages, sequence, kv_head);
    wait_for_previous();
    let_next_start();
    PageShare share = share_pages(pages, top, tokens, rows, mine, cache, TENSOR_TILE, list, capacity);
    rows.count = share.active * rows.group;
    if (rows.first >= rows.count) return; /* nobody reads these parts */
    count_reads(reads + 2 * sequence, share, rows, mine.part);
    TensorRows state;
    state.limit[0] = state.limit[1] = share.listed;
    attend(state, cache, share.where, kv_head, share.tiles.first, share.tiles.last, share.listed / TENSOR_TILE,
           shared_address(shared_bytes), [&]() { load_queries(state, q, tokens, rows); });
    write_part(state, (float *)shared_bytes, parts, blockIdx.y, rows);
}

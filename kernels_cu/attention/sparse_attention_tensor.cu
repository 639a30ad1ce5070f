/* sparse_attention.cu on tensor cores; one part per thread block.
 *
 * Grid: (kv_heads, parts, sequences * rows / BLOCK_ROWS). Must read the listed pages once: 2 * positions * head_dim. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sparse_attention_tensor(const float *q, const int *tokens, CachesView caches, PagesView pages, int capacity,
                            int *reads, PartsView parts, int heads, int sequence_tokens)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    SequenceRows mine(tokens, parts.tokens, heads / caches.kv_heads, BLOCK_ROWS);
    int kv_head = blockIdx.x, sequence = mine.sequence;
    CacheView cache = caches.of(sequence);
    QueryRows rows(mine.first_row, parts.tokens, kv_head, heads, cache);
    q += (size_t)sequence * sequence_tokens * heads * HEAD_DIM;
    int *list = (int *)(shared_bytes + STAGES * 2 * TILE_BYTES);
    const int *top = prefetch_top(pages, sequence, kv_head);
    wait_for_previous();
    let_next_start();
    PageShare share = share_pages(pages, top, mine.tokens, rows, sequence, cache, TENSOR_TILE, list, capacity);
    rows.count = share.active * rows.group;
    if (rows.first >= rows.count) return; /* nobody reads these parts */
    count_reads(reads + 2 * sequence, share, rows);
    TensorRows state;
    state.limit[0] = state.limit[1] = share.listed;
    attend(state, cache, share.where, kv_head, share.tiles.first, share.tiles.last, share.listed / TENSOR_TILE,
           shared_address(shared_bytes), [&]() { load_queries(state, q, mine.tokens, rows); });
    write_part(state, (float *)shared_bytes, parts, sequence * gridDim.y + blockIdx.y, rows);
}

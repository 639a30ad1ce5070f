/* Writes k, v [tokens, kv_heads, head_dim] into the cache from position `length` on, and includes the keys, as they are
 * stored, in the bounds of their pages.
 *
 * A page's first position starts its bounds. A key that is not finite becomes NaN: so does its score, whatever the
 * query, and it shows in the logits.
 *
 * Grid: (kv_heads, pages that the tokens can touch), one thread per channel. Must read k and v and write them once. */
extern "C" __global__ void cache_write(CacheView cache, const float *k, const float *v, int tokens)
{
    let_next_start();
    wait_for_previous();
    int head = blockIdx.x, channel = threadIdx.x, page_size = cache.page_size;
    int length = *cache.length, page = length / page_size + blockIdx.y;
    int first = max(length, page * page_size), last = min(length + tokens, (page + 1) * page_size);
    if (channel >= cache.head_dim || first >= last) return;
    KVValue *bounds = cache.bounds(head, page, cache.chunk_pages()) + channel;
    bool starts = first == page * page_size;
    float smallest = starts ? INFINITE : widen(bounds[0]);
    float largest = starts ? -INFINITE : widen(bounds[cache.head_dim]);
    for (int position = first; position < last; position++) {
        size_t from = ((size_t)(position - length) * cache.kv_heads + head) * cache.head_dim + channel;
        KVValue stored = narrow<KVValue>(k[from]);
        float key = widen(stored);
        if (!(key - key == 0)) stored = narrow<KVValue>(key = NOT_A_NUMBER);
        *cache.at(CACHED_KEYS, head, position, channel) = stored;
        *cache.at(CACHED_VALUES, head, position, channel) = narrow<KVValue>(v[from]);
        /* A NaN bound stays NaN. */
        if (!(key >= smallest)) smallest = smallest == smallest ? key : smallest;
        if (!(key <= largest)) largest = largest == largest ? key : largest;
    }
    bounds[0] = narrow<KVValue>(smallest);
    bounds[cache.head_dim] = narrow<KVValue>(largest);
}

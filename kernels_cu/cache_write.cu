/* Keys and values k, v [tokens, kv_heads, head_dim] into the cache from position `length` on, and the
 * keys, as they are held, into their pages' bounds.
 *
 * Bounds chunk: [layers, kv_heads, pages of the chunk, 2 (smallest, largest), head_dim] of Held.
 * Grid: a block a kv head, a thread a channel: tokens go one after the other, so that a page's first
 * position opens its bounds. Moves k and v in and out. */
extern "C" __global__ void cache_write(CACHE_PARAMETERS, const unsigned long long *bound_chunks, int page_size,
                                       const float *k, const float *v, int tokens)
{
    CacheView cache = CACHE_VIEW;
    int head = blockIdx.x, d = threadIdx.x, pages = cache.chunk_positions / page_size;
    if (d >= cache.head_dim) return;
    for (int t = 0; t < tokens; t++) {
        int position = *cache.length + t;
        size_t from = ((size_t)t * cache.kv_heads + head) * cache.head_dim + d;
        Held key = narrow(k[from]);
        cache.row(0, head, position)[d] = key;
        cache.row(1, head, position)[d] = narrow(v[from]);
        int place = position % cache.chunk_positions;
        size_t page = ((size_t)cache.layer * cache.kv_heads + head) * pages + place / page_size;
        Held *smallest = (Held *)bound_chunks[position / cache.chunk_positions] + page * 2 * cache.head_dim + d;
        Held *largest = smallest + cache.head_dim;
        bool opens = position % page_size == 0;
        if (opens || widen(key) < widen(*smallest)) *smallest = key;
        if (opens || widen(key) > widen(*largest)) *largest = key;
    }
}

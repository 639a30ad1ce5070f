/* Keys and values k, v [tokens, kv_heads, head_dim] into the cache from position `length` on, and the
 * keys, as they are held, into their pages' bounds.
 *
 * Bounds chunk: [layers, kv_heads, pages of the chunk, 2 (smallest, largest), head_dim] of Held. A
 * page's first position opens its bounds. A key that is not finite becomes NaN: its score is then one
 * whatever the query, and shows in the logits.
 *
 * Grid: (kv_heads, pages that the tokens can touch), a thread a channel. Moves k and v in and out. */
extern "C" __global__ void cache_write(CACHE_PARAMETERS, const unsigned long long *bound_chunks, int page_size,
                                       const float *k, const float *v, int tokens)
{
    let_next_start();
    wait_for_previous();
    CacheView cache = CACHE_VIEW;
    int head = blockIdx.x, d = threadIdx.x, pages = cache.chunk_positions / page_size;
    int length = *cache.length, page = length / page_size + blockIdx.y;
    int first = max(length, page * page_size), last = min(length + tokens, (page + 1) * page_size);
    if (d >= cache.head_dim || first >= last) return;
    int chunk = page / pages;
    size_t row = ((size_t)cache.layer * cache.kv_heads + head) * pages + page % pages;
    Held *bounds = (Held *)bound_chunks[chunk] + row * 2 * cache.head_dim + d;
    bool opens = first == page * page_size;
    float smallest = opens ? INFINITE : widen(bounds[0]);
    float largest = opens ? -INFINITE : widen(bounds[cache.head_dim]);
    for (int position = first; position < last; position++) {
        size_t from = ((size_t)(position - length) * cache.kv_heads + head) * cache.head_dim + d;
        Held held = narrow(k[from]);
        float key = widen(held);
        if (!(key - key == 0)) held = narrow(key = NOT_A_NUMBER);
        *cache.at(0, head, position, d) = held;
        *cache.at(1, head, position, d) = narrow(v[from]);
        /* Once NaN, a bound stays so. */
        if (!(key >= smallest)) smallest = smallest == smallest ? key : smallest;
        if (!(key <= largest)) largest = largest == largest ? key : largest;
    }
    bounds[0] = narrow(smallest);
    bounds[cache.head_dim] = narrow(largest);
}

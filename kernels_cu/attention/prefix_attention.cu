/* Attention of queries q [caches, parts.tokens, heads, head_dim] over the paged prefix of their cache, split over the
 * prefix. A cache's queries are those of `sequences` with as many tokens each, whose prefixes are ascending.
 *
 * A cache's part s of S has the s-th S-th of its longest prefix's tiles of PLAIN_TILE positions, as long as it is when
 * the kernel runs. Which parts are whose is planned by the host before each pass.
 *
 * Grid: (kv_heads, parts, rows / PLAIN_ROWS). Must read keys and values once: 2 * kv_heads * length * head_dim. */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    prefix_attention(const float *q, CachesView caches, PartsView parts, const int *owners, int heads, int sequences)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    __shared__ int limit[PLAIN_ROWS];
    int kv_head = blockIdx.x, dim = caches.head_dim;
    PrefixPart mine(parts, owners);
    if (mine.cache < 0) return;
    CacheView cache = caches.of(mine.cache * sequences);
    q += (size_t)mine.cache * parts.tokens * heads * dim;
    QueryRows rows(blockIdx.z * PLAIN_ROWS, parts.tokens, kv_head, heads, cache);
    Prefixes prefixes(cache, rows, sequences);
    TileRange tiles = tiles_of_part((prefixes.all + WARP - 1) / WARP, mine.part, mine.parts);
    if (threadIdx.x < PLAIN_ROWS) limit[threadIdx.x] = prefixes.limit(rows.first + threadIdx.x);
    load_queries(shared, q, nullptr, rows, dim);
    __syncthreads();
    PlainRows state;
    attend(state, shared, limit, tiles.first * WARP, min(prefixes.all, tiles.last * WARP), cache, WholePrefix(),
           kv_head, shared + PLAIN_ROWS * dim);
    write_part(state, parts, blockIdx.y, rows, dim);
}

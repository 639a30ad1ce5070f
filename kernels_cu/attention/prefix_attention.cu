/* Attention of queries q [blocks, block_tokens, heads, head_dim] over the paged prefix of their cache, split over the
 * prefix. A cache's queries are those of its blocks (CacheBlocks), whose prefixes are ascending; parts have room for
 * parts.tokens of them.
 *
 * A cache's part s of S has the s-th S-th of its longest prefix's tiles of PLAIN_TILE positions, as long as it is when
 * the kernel runs. Which parts are whose is planned by the host before each pass.
 *
 * Grid: (kv_heads, parts, rows / PLAIN_ROWS). Must read keys and values once: 2 * kv_heads * length * head_dim. */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    prefix_attention(const float *q, CachesView caches, PartsView parts, const int *owners, const int *rides, int heads,
                     int per_cache, int block_tokens)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    __shared__ int limit[PLAIN_ROWS];
    int kv_head = blockIdx.x, dim = caches.head_dim;
    PrefixPart mine(parts, owners);
    if (mine.cache < 0) return;
    CacheBlocks blocks(mine.cache, rides, per_cache);
    CacheView cache = caches.of(blocks.first);
    q += (size_t)blocks.first * block_tokens * heads * dim;
    QueryRows rows(blockIdx.z * PLAIN_ROWS, blocks.count * block_tokens, kv_head, heads, cache);
    if (rows.first >= rows.count) return; /* a cache with two blocks has more */
    Prefixes prefixes(cache, rows, blocks.count);
    TileRange tiles = tiles_of_part((prefixes.all + WARP - 1) / WARP, mine.part, mine.parts);
    if (threadIdx.x < PLAIN_ROWS) limit[threadIdx.x] = prefixes.limit(rows.first + threadIdx.x);
    load_queries(shared, q, nullptr, rows, dim);
    __syncthreads();
    PlainRows state;
    attend(state, shared, limit, tiles.first * WARP, min(prefixes.all, tiles.last * WARP), cache, WholePrefix(),
           kv_head, shared + PLAIN_ROWS * dim);
    write_part(state, parts, blockIdx.y, rows, dim);
}

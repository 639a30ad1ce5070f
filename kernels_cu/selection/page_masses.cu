/* The mass of attention on each MASS_UNIT positions of the prefix: the sum of exp(score - lse).
 *
 * q [sequences, tokens, heads, head_dim], lse [sequences, tokens, heads]. Writes the prefixes' units of masses [caches,
 * kv_heads, rows, stride], for the last of the per_cache sequences of each cache.
 *
 * Grid: (kv_heads, splits, caches * rows / PLAIN_ROWS). Must read the keys, which it does once for PLAIN_ROWS rows.
 */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    page_masses(const float *q, const float *lse, CachesView caches, float *masses, int stride, int tokens, int heads,
                int per_cache)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    SequenceRows mine(nullptr, tokens, heads / caches.kv_heads, PLAIN_ROWS);
    int sequence = (mine.sequence + 1) * per_cache - 1;
    CacheView cache = caches.of(sequence);
    int kv_head = blockIdx.x, dim = cache.head_dim, length = *cache.length, tiles = (length + WARP - 1) / WARP;
    QueryRows rows(mine.first_row, tokens, kv_head, heads, cache);
    q += (size_t)sequence * tokens * heads * dim, lse += sequence * tokens * heads;
    masses += (size_t)mine.sequence * cache.kv_heads * rows.count * stride;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, key_stride = dim + 1;
    float *keys = shared + PLAIN_ROWS * dim;
    load_queries(shared, q, nullptr, rows, dim);
    for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
        __syncthreads();
        for (int i = threadIdx.x; i < WARP * dim; i += PLAIN_THREADS) {
            int position = tile * WARP + i / dim, d = i % dim;
            keys[i / dim * key_stride + d] = position < length ? cache.value(CACHED_KEYS, kv_head, position, d) : 0.0f;
        }
        __syncthreads();
        for (int r = 0; r < WARP_ROW_COUNT; r++) {
            int index = warp * WARP_ROW_COUNT + r, row = rows.first + index, position = tile * WARP + lane;
            if (row >= rows.count) break;
            float score = 0, row_lse = lse[rows.index(row)];
            for (int d = 0; d < dim; d++) score += shared[index * dim + d] * keys[lane * key_stride + d];
            float mass = warp_sum<MASS_UNIT>(position < length ? expf(score - row_lse) : 0.0f);
            if (lane % MASS_UNIT == 0 && position < length)
                masses[((size_t)kv_head * rows.count + row) * stride + position / MASS_UNIT] = mass;
        }
    }
}

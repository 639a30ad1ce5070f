/* Block-causal attention of a piece of the prompt, positions length, length + 1, ..., whose keys and values are in the
 * cache already: a token sees all positions up to the end of its own block. q [tokens, heads, head_dim]; o alike,
 * narrowed for the matmul that follows. Where rows are few and the prefix is long, it is split over the positions that
 * rows see: instead of o, parts are written.
 *
 * Grid: (kv_heads, rows / PLAIN_ROWS, parts). Must do 4 * head_dim * heads operations per token and position that it
 * sees. */
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)
    causal_attention(const float *q, CachesView caches, Activation *o, PartsView parts, int tokens, int heads,
                     int block_length)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    __shared__ int limit[PLAIN_ROWS];
    CacheView cache = caches.of(0);
    int kv_head = blockIdx.x, dim = cache.head_dim;
    QueryRows rows(blockIdx.y * PLAIN_ROWS, tokens, kv_head, heads, cache);
    int last_row = min(rows.first + PLAIN_ROWS, rows.count) - 1, row = min(rows.first + (int)threadIdx.x, last_row);
    if (threadIdx.x < PLAIN_ROWS) limit[threadIdx.x] = rows.causal_limit(row, *cache.length, block_length);
    load_queries(shared, q, nullptr, rows, dim);
    __syncthreads();
    int all = limit[PLAIN_ROWS - 1];
    TileRange tiles = tiles_of_part((all + PLAIN_TILE - 1) / PLAIN_TILE, blockIdx.z, gridDim.z);
    PlainRows state;
    attend(state, shared, limit, tiles.first * PLAIN_TILE, min(all, tiles.last * PLAIN_TILE), cache, WholePrefix(),
           kv_head, shared + PLAIN_ROWS * dim);
    if (gridDim.z > 1) {
        write_part(state, parts, blockIdx.z, rows, dim);
        return;
    }
    each_row(rows, [&](int r, int row) {
        size_t at = rows.index(row) * dim;
        int lane = threadIdx.x % WARP;
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane + i * WARP < dim) o[at + lane + i * WARP] = narrow<Activation>(state.o[r][i] / state.total[r]);
    });
}

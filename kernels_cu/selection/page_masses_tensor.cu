/* page_masses.cu on tensor cores.
 *
 * Compiled with KEY_WARPS of 4 or less, so that a warp has whole units. Grid: (kv_heads, splits, caches * rows /
 * BLOCK_ROWS). Must read the keys, which it does once for each z. */
static_assert(WARP_KEYS % MASS_UNIT == 0 && MASS_UNIT == 16, "whole units, of two columns of B fragments");

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    page_masses_tensor(const float *q, const float *lse, CachesView caches, float *masses, int stride, int tokens,
                       int heads, int per_cache)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    unsigned shared = shared_address(shared_bytes);
    SequenceRows mine(nullptr, tokens, heads / caches.kv_heads, BLOCK_ROWS);
    int sequence = (mine.sequence + 1) * per_cache - 1;
    CacheView cache = caches.of(sequence);
    int kv_head = blockIdx.x, length = *cache.length;
    QueryRows rows(mine.first_row, tokens, kv_head, heads, cache);
    q += (size_t)sequence * tokens * heads * HEAD_DIM, lse += sequence * tokens * heads;
    masses += (size_t)mine.sequence * cache.kv_heads * rows.count * stride;
    TileRange tiles = tiles_of_part((length + TENSOR_TILE - 1) / TENSOR_TILE, blockIdx.y, gridDim.y);
    int key_warp = threadIdx.x / WARP % KEY_WARPS, t = threadIdx.x % 4;
    TensorRows state;
    load_queries(state, q, nullptr, rows);
    float base[2];
    float *to[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = min(state.row[half], rows.count - 1);
        base[half] = lse[rows.index(row)] * LOG2_E;
        to[half] = masses + ((size_t)kv_head * rows.count + row) * stride;
    }
    auto load = [&](int tile) {
        const KVValue *keys = cache.group(CACHED_KEYS, kv_head, tile * TENSOR_TILE);
        unsigned stage = shared + (tile - tiles.first) % STAGES * TILE_BYTES;
#pragma unroll
        for (int i = threadIdx.x; i < TILE_PIECES; i += THREADS)
            copy_16_bytes_async(stage + i * 16, (const uint4 *)keys + i);
    };
    start_copies<STAGES>(tiles.first, tiles.last, load);
    for (int tile = tiles.first; tile < tiles.last; tile++) {
        advance_copies<STAGES>(tile, tiles.last, load);
        float score[WARP_KEYS / 2] = {};
        scores_of_tile(score, state, shared + (tile - tiles.first) % STAGES * TILE_BYTES);
#pragma unroll
        for (int unit = 0; unit < WARP_KEYS / MASS_UNIT; unit++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int position = tile * TENSOR_TILE + key_warp * WARP_KEYS + unit * MASS_UNIT;
                float mass = 0;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (position + i / 2 * 8 + t * 2 + i % 2 < length)
                        mass += exp2f(score[unit * 8 + i / 2 * 4 + half * 2 + i % 2] - base[half]);
                mass = quad_sum(mass);
                if (t == 0 && position < length && state.row[half] < rows.count) to[half][position / MASS_UNIT] = mass;
            }
    }
}

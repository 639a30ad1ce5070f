/* page_masses.cu on tensor cores.
 *
 * Grid: (kv_heads, splits, rows / BLOCK_ROWS). Moves the keys in, once in each z. Compiled with KEY_WARPS = 4 or
 * less, so that a warp has whole units. */
#define UNIT 16

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    page_masses_tensor(const float *q, const float *lse, CACHE_PARAMETERS, float *masses, int stride, int tokens,
                       int heads)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    unsigned shared = shared_address(shared_bytes);
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int rows = tokens * group, length = *cache.length, tiles = (length + TILE - 1) / TILE;
    int first = (int)((long long)tiles * part / parts), last = (int)((long long)tiles * (part + 1) / parts);
    int key_warp = threadIdx.x / WARP % KEY_WARPS, lane = threadIdx.x % WARP, t = lane % 4;
    TensorRows state;
    load_queries(state, q, nullptr, blockIdx.z * BLOCK_ROWS, rows, kv_head, group, heads);
    float base[2];
    float *to[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = min(state.row[half], rows - 1);
        base[half] = lse[(size_t)(row / group) * heads + kv_head * group + row % group] * 1.44269504f;
        to[half] = masses + ((size_t)kv_head * rows + row) * stride;
    }
    auto load = [&](int tile) {
        const Held *keys = cache.group(0, kv_head, tile * TILE);
        unsigned stage = shared + (tile - first) % STAGES * TILE_BYTES;
#pragma unroll
        for (int i = threadIdx.x; i < TILE * PIECES; i += THREADS) copy_16_bytes_async(stage + i * 16, keys + i * 8);
    };
    for (int s = 0; s < STAGES - 1; s++) {
        if (first + s < last) load(first + s);
        commit_copies();
    }
    for (int tile = first; tile < last; tile++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (tile + STAGES - 1 < last) load(tile + STAGES - 1);
        commit_copies();
        float score[WARP_KEYS / 8][4] = {};
        scores_of_tile(score, state, shared + (tile - first) % STAGES * TILE_BYTES);
#pragma unroll
        for (int unit = 0; unit < WARP_KEYS / UNIT; unit++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int position = tile * TILE + key_warp * WARP_KEYS + unit * UNIT;
                float mass = 0;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (position + i / 2 * 8 + t * 2 + i % 2 < length)
                        mass += exp2f(score[unit * 2 + i / 2][half * 2 + i % 2] - base[half]);
                mass += __shfl_xor_sync(~0u, mass, 1);
                mass += __shfl_xor_sync(~0u, mass, 2);
                if (t == 0 && position < length && state.row[half] < rows) to[half][position / UNIT] = mass;
            }
    }
}

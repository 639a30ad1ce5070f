/* The mass of attention that falls on each 16 positions of the prefix: the sum of exp(score - lse).
 *
 * q [tokens, heads, head_dim], lse [tokens, heads]; row r of a kv head is (token r / group, head r % group of
 * the group). masses [kv_heads, rows, stride], of which the prefix's are written.
 *
 * Grid: (kv_heads, splits, rows / ROWS). Moves the keys in, once every ROWS rows. */
#define UNIT 16

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    page_masses(const float *q, const float *lse, CACHE_PARAMETERS, float *masses, int stride, int tokens, int heads)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ float shared[];
    int kv_head = blockIdx.x, group = heads / cache.kv_heads, dim = cache.head_dim, rows = tokens * group;
    int first_row = blockIdx.z * ROWS, length = *cache.length, tiles = (length + WARP - 1) / WARP;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, key_stride = dim + 1;
    float *keys = shared + ROWS * dim;
    load_queries(shared, q, nullptr, first_row, rows, kv_head, group, heads, dim);
    for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
        __syncthreads();
        for (int i = threadIdx.x; i < WARP * dim; i += ATTENTION_THREADS) {
            int position = tile * WARP + i / dim;
            keys[i / dim * key_stride + i % dim] = position < length ? widen(*cache.at(0, kv_head, position, i % dim)) : 0.0f;
        }
        __syncthreads();
        for (int r = 0; r < ROWS_OF_WARP; r++) {
            int place = warp * ROWS_OF_WARP + r, row = first_row + place;
            if (row >= rows) break;
            float score = 0, of_row = lse[(size_t)(row / group) * heads + kv_head * group + row % group];
            for (int d = 0; d < dim; d++) score += shared[place * dim + d] * keys[lane * key_stride + d];
            float mass = tile * WARP + lane < length ? expf(score - of_row) : 0.0f;
            for (int step = UNIT / 2; step; step /= 2) mass += __shfl_xor_sync(~0u, mass, step);
            if (lane % UNIT == 0 && tile * WARP + lane < length)
                masses[((size_t)kv_head * rows + row) * stride + (tile * WARP + lane) / UNIT] = mass;
        }
    }
}

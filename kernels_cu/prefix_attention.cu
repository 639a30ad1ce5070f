/* Attention of a block's queries over the paged prefix, split over the prefix.
 * q [tokens, heads, head_dim]; a kv head's rows are (token, head of its group).
 *
 * Grid: (kv_heads, splits, rows / ROWS). Part s of S takes the s-th S-th of the prefix's tiles of 32
 * positions, as long as it is when the kernel runs. Must move keys and values once:
 * 2 * kv_heads * length * head_dim. Writes unnormalised o [splits, tokens, heads, head_dim] and
 * maximum and sum [splits, tokens, heads]. */
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    prefix_attention(const float *q, CACHE_PARAMETERS, float *o, float *tops, float *totals, int tokens, int heads)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ float shared[];
    __shared__ int limit[ROWS];
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int dim = cache.head_dim, rows = tokens * group, length = *cache.length;
    int tiles = (length + WARP - 1) / WARP;
    int first = (int)((long long)tiles * part / parts) * WARP;
    int last = min(length, (int)((long long)tiles * (part + 1) / parts) * WARP);
    if (threadIdx.x < ROWS) limit[threadIdx.x] = length;
    load_queries(shared, q, nullptr, blockIdx.z * ROWS, rows, kv_head, group, heads, dim);
    __syncthreads();
    Rows state;
    attend(state, shared, limit, first, last, cache, Whole(), kv_head, shared + ROWS * dim);
    write_part(state, part, blockIdx.z * ROWS, rows, tokens, kv_head, group, heads, dim, o, tops, totals);
}

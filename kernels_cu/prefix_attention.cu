/* Attention of a block's queries over the paged prefix, split over the prefix, and the merge of the
 * parts. q [tokens, heads, head_dim]; a kv head's rows are (token, head of its group).
 *
 * Grid: (kv_heads, splits, rows / ROWS). Part s of S takes the s-th S-th of the prefix's tiles of 32
 * positions, as long as it is when the kernel runs. Must move keys and values once:
 * 2 * kv_heads * length * head_dim. Writes unnormalised o [splits, tokens, heads, head_dim] and
 * maximum and sum [splits, tokens, heads]. */
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)
    prefix_attention(const float *q, CACHE_PARAMETERS, float *o, float *tops, float *totals, int tokens, int heads)
{
    CacheView cache = CACHE_VIEW;
    extern __shared__ float shared[];
    __shared__ int limit[ROWS];
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int dim = cache.head_dim, rows = tokens * group, length = *cache.length;
    int tiles = (length + WARP - 1) / WARP;
    int first = (int)((long long)tiles * part / parts) * WARP;
    int last = min(length, (int)((long long)tiles * (part + 1) / parts) * WARP);
    float *queries = shared, scale = rsqrtf((float)dim);
    if (threadIdx.x < ROWS) limit[threadIdx.x] = length;
    for (int i = threadIdx.x; i < ROWS * dim; i += blockDim.x) {
        int row = blockIdx.z * ROWS + i / dim;
        size_t at = ((size_t)(row / group) * heads + kv_head * group + row % group) * dim + i % dim;
        queries[i] = row < rows ? q[at] * scale : 0.0f;
    }
    Rows state;
    attend(state, queries, limit, first, last, dim, shared + ROWS * dim,
           [&](int value, int position) { return cache.row(value, kv_head, position); });
    for (int r = 0; r < ROWS_OF_WARP; r++) {
        int row = blockIdx.z * ROWS + threadIdx.x / WARP * ROWS_OF_WARP + r, lane = threadIdx.x % WARP;
        if (row >= rows) break;
        size_t at = ((size_t)part * tokens + row / group) * heads + kv_head * group + row % group;
        for (int i = 0; i < CHANNELS_OF_LANE; i++)
            if (lane + i * WARP < dim) o[at * dim + lane + i * WARP] = state.o[r][i];
        if (lane == 0) {
            tops[at] = state.top[r];
            totals[at] = state.total[r];
        }
    }
}

/* The parts' o, maxima and sums into o [tokens, heads, head_dim] and log-sum-exp [tokens, heads].
 * Grid: (tokens, heads), head_dim threads. Moves the parts in. */
extern "C" __global__ void merge_parts(const float *parts_o, const float *tops, const float *totals, float *o,
                                       float *lse, int parts, int head_dim)
{
    size_t row = (size_t)blockIdx.x * gridDim.y + blockIdx.y, rows = (size_t)gridDim.x * gridDim.y;
    float top = -INFINITE, total = 0, sum = 0;
    for (int part = 0; part < parts; part++) top = fmaxf(top, tops[part * rows + row]);
    for (int part = 0; part < parts; part++) {
        size_t at = part * rows + row;
        float factor = tops[at] == -INFINITE ? 1.0f : expf(tops[at] - top);
        total += totals[at] * factor;
        if (threadIdx.x < head_dim) sum += parts_o[at * head_dim + threadIdx.x] * factor;
    }
    if (threadIdx.x < head_dim) o[row * head_dim + threadIdx.x] = total == 0 ? 0.0f : sum / total;
    if (threadIdx.x == 0) lse[row] = total == 0 ? -INFINITE : top + logf(total);
}

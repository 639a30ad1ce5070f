/* Attention over the cache without tensor cores: PLAIN_ROWS query rows against tiles of PLAIN_TILE keys, by the online
 * softmax. A warp has PLAIN_ROWS / warps of the rows; its lanes are keys in scores, channels in values. Keys and values
 * go through shared memory as float32. */
static_assert(PLAIN_TILE == WARP, "one lane per key");
#define WARP_ROW_COUNT (PLAIN_ROWS / (PLAIN_THREADS / WARP))
#define LANE_CHANNELS (LARGEST_HEAD_DIM / WARP)

struct PlainRows {
    float o[WARP_ROW_COUNT][LANE_CHANNELS]; /* channel lane + 32 i */
    float top[WARP_ROW_COUNT], total[WARP_ROW_COUNT];
};

/* Scaled queries from q [tokens, heads, head_dim] to shared memory [PLAIN_ROWS][head_dim]. With `tokens`, row r is of
 * token tokens[r / group], of any token where that is negative. */
__device__ __forceinline__ void load_queries(float *to, const float *q, const int *tokens, const QueryRows &rows,
                                             int head_dim)
{
    float scale = rsqrtf((float)head_dim);
    for (int i = threadIdx.x; i < PLAIN_ROWS * head_dim; i += PLAIN_THREADS) {
        int row = rows.first + i / head_dim, token = row / rows.group;
        if (row < rows.count && tokens) token = tokens[token];
        size_t at = rows.index(token, row) * head_dim + i % head_dim;
        to[i] = row < rows.count ? q[at] * scale : 0.0f;
    }
}

/* q as load_queries leaves it. Row r sees first <= index < limit[r], at positions where(index); `last` is the largest
 * limit. */
template <class Where>
__device__ __forceinline__ void attend(PlainRows &rows, const float *q, const int *limit, int first, int last,
                                       const CacheView &cache, const Where &where, int kv_head, float *shared)
{
    int head_dim = cache.head_dim;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, stride = head_dim + 1;
    float *keys = shared, *values = shared + WARP * stride;
    for (int r = 0; r < WARP_ROW_COUNT; r++) {
        rows.top[r] = -INFINITE;
        rows.total[r] = 0;
        for (int i = 0; i < LANE_CHANNELS; i++) rows.o[r][i] = 0;
    }
    for (int tile = first; tile < last; tile += WARP) {
        __syncthreads();
        for (int i = threadIdx.x; i < WARP * head_dim; i += PLAIN_THREADS) {
            int j = i / head_dim, d = i % head_dim;
            bool inside = tile + j < last;
            int position = inside ? where(tile + j) : 0;
            keys[j * stride + d] = inside ? cache.value(CACHED_KEYS, kv_head, position, d) : 0.0f;
            values[j * stride + d] = inside ? cache.value(CACHED_VALUES, kv_head, position, d) : 0.0f;
        }
        __syncthreads();
        for (int r = 0; r < WARP_ROW_COUNT; r++) {
            int row = warp * WARP_ROW_COUNT + r;
            float score = 0;
            for (int d = 0; d < head_dim; d++) score += q[row * head_dim + d] * keys[lane * stride + d];
            if (tile + lane >= limit[row]) score = -INFINITE;
            float top = fmaxf(rows.top[r], warp_max(score));
            /* Before the row's first key both maxima are -inf; a NaN score stays NaN. */
            float factor = top == -INFINITE ? 1.0f : expf(rows.top[r] - top);
            float p = score == -INFINITE ? 0.0f : expf(score - top);
            rows.total[r] = rows.total[r] * factor + warp_sum(p);
            rows.top[r] = top;
            for (int i = 0; i < LANE_CHANNELS; i++) {
                int d = lane + i * WARP;
                if (i * WARP >= head_dim) break;
                float sum = rows.o[r][i] * factor;
                for (int j = 0; j < WARP; j++) {
                    float weight = __shfl_sync(~0u, p, j);
                    if (d < head_dim) sum += weight * values[j * stride + d];
                }
                rows.o[r][i] = sum;
            }
        }
    }
}

/* Calls visit(r, row) for each of the warp's rows, of which r is the number within the warp. */
template <class Visit> __device__ __forceinline__ void each_row(const QueryRows &rows, const Visit &visit)
{
    for (int r = 0; r < WARP_ROW_COUNT; r++) {
        int row = rows.first + threadIdx.x / WARP * WARP_ROW_COUNT + r;
        if (row >= rows.count) break;
        visit(r, row);
    }
}

/* This thread block's rows of one part. */
__device__ __forceinline__ void write_part(const PlainRows &state, const PartsView &parts, int part,
                                           const QueryRows &rows, int head_dim)
{
    int lane = threadIdx.x % WARP;
    each_row(rows, [&](int r, int row) {
        size_t at = rows.index(part * parts.tokens + row / rows.group, row);
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane + i * WARP < head_dim) parts.o[at * head_dim + lane + i * WARP] = state.o[r][i];
        if (lane == 0) {
            parts.tops[at] = state.top[r];
            parts.totals[at] = state.total[r];
        }
    });
}

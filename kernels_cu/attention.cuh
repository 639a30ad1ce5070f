/* The plain attention over the cache that prefix and prefill share: ROWS query rows against tiles of WARP keys, by the
 * online softmax. A warp has ROWS / warps of the rows; in scores its lanes are keys, in values
 * channels. Keys and values come through shared memory, as float32. */
#define ROWS 16
#define ATTENTION_THREADS 256
#define ROWS_OF_WARP (ROWS / (ATTENTION_THREADS / WARP))
#define MAX_HEAD_DIM 256
#define CHANNELS_OF_LANE (MAX_HEAD_DIM / WARP)

struct Rows {
    float o[ROWS_OF_WARP][CHANNELS_OF_LANE]; /* channel lane + 32 i */
    float top[ROWS_OF_WARP], total[ROWS_OF_WARP];
};

/* Queries of rows first_row, first_row + 1, ... of a kv head, a row being (token, head of the group),
 * from q [tokens, heads, head_dim] to [ROWS][head_dim] in shared memory, scaled. With `tokens`, row r is of token
 * tokens[r / group]; where that is negative, of any. */
__device__ __forceinline__ void load_queries(float *to, const float *q, const int *tokens, int first_row, int rows,
                                             int kv_head, int group, int heads, int head_dim)
{
    float scale = rsqrtf((float)head_dim);
    for (int i = threadIdx.x; i < ROWS * head_dim; i += ATTENTION_THREADS) {
        int row = first_row + i / head_dim;
        int token = row < rows && tokens ? max(tokens[row / group], 0) : row / group;
        size_t at = ((size_t)token * heads + kv_head * group + row % group) * head_dim + i % head_dim;
        to[i] = row < rows ? q[at] * scale : 0.0f;
    }
}

/* q as load_queries leaves them. Row r sees places first <= p < limit[r], at positions where(p); `last` is the
 * largest limit. */
template <class Where>
__device__ __forceinline__ void attend(Rows &rows, const float *q, const int *limit, int first, int last,
                                       const CacheView &cache, const Where &where, int kv_head, float *shared)
{
    int head_dim = cache.head_dim;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, stride = head_dim + 1;
    float *keys = shared, *values = shared + WARP * stride;
    for (int r = 0; r < ROWS_OF_WARP; r++) {
        rows.top[r] = -INFINITE;
        rows.total[r] = 0;
        for (int i = 0; i < CHANNELS_OF_LANE; i++) rows.o[r][i] = 0;
    }
    for (int tile = first; tile < last; tile += WARP) {
        __syncthreads();
        for (int i = threadIdx.x; i < WARP * head_dim; i += ATTENTION_THREADS) {
            int j = i / head_dim, d = i % head_dim;
            bool there = tile + j < last;
            int position = there ? where(tile + j) : 0;
            keys[j * stride + d] = there ? widen(*cache.at(0, kv_head, position, d)) : 0.0f;
            values[j * stride + d] = there ? widen(*cache.at(1, kv_head, position, d)) : 0.0f;
        }
        __syncthreads();
        for (int r = 0; r < ROWS_OF_WARP; r++) {
            int row = warp * ROWS_OF_WARP + r;
            float score = 0;
            for (int d = 0; d < head_dim; d++) score += q[row * head_dim + d] * keys[lane * stride + d];
            if (tile + lane >= limit[row]) score = -INFINITE;
            float top = fmaxf(rows.top[r], warp_max(score));
            /* Before the row's first key both maxima are -inf; a NaN score stays one. */
            float factor = top == -INFINITE ? 1.0f : expf(rows.top[r] - top);
            float p = score == -INFINITE ? 0.0f : expf(score - top);
            rows.total[r] = rows.total[r] * factor + warp_sum(p);
            rows.top[r] = top;
            for (int i = 0; i < CHANNELS_OF_LANE; i++) {
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

/* This block's rows of one part: unnormalised o [parts, tokens, heads, head_dim], maximum and sum [parts, tokens,
 * heads]. */
__device__ __forceinline__ void write_part(const Rows &state, int part, int first_row, int rows, int tokens, int kv_head,
                                           int group, int heads, int head_dim, float *o, float *tops, float *totals)
{
    for (int r = 0; r < ROWS_OF_WARP; r++) {
        int row = first_row + threadIdx.x / WARP * ROWS_OF_WARP + r, lane = threadIdx.x % WARP;
        if (row >= rows) break;
        size_t at = ((size_t)part * tokens + row / group) * heads + kv_head * group + row % group;
        for (int i = 0; i < CHANNELS_OF_LANE; i++)
            if (lane + i * WARP < head_dim) o[at * head_dim + lane + i * WARP] = state.o[r][i];
        if (lane == 0) {
            tops[at] = state.top[r];
            totals[at] = state.total[r];
        }
    }
}

/* The plain attention that all variants share: ROWS query rows against tiles of WARP keys, by the
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

/* q [ROWS][head_dim] in shared memory, scaled. `row_of(value, position)` gives a pointer to head_dim
 * keys or values. Row r sees positions first <= p < limit[r]; `last` is the largest limit. */
template <class RowOf>
__device__ __forceinline__ void attend(Rows &rows, const float *q, const int *limit, int first, int last,
                                       int head_dim, float *shared, RowOf row_of)
{
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
            keys[j * stride + d] = there ? widen(row_of(0, tile + j)[d]) : 0.0f;
            values[j * stride + d] = there ? widen(row_of(1, tile + j)[d]) : 0.0f;
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

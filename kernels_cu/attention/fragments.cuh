/* What mma (attention/tensor.cuh) and wgmma (attention/hopper.cuh) have in common: a thread holds two query rows, g and
 * g + 8 of its warp's 16, where lane = 4 g + t, and of every 8 neighbouring keys or channels numbers 2t and 2t + 1.
 * With `half` for the row and j for the number, element n * 4 + half * 2 + j of an array is of the n-th 8. */

/* Of weights times scales of values, which else might be subnormal in float16. */
#define VALUE_FACTOR (LOSART_KV == KV_INT8 ? 64 : 256)
#define QUERY_SCALE (rsqrtf((float)HEAD_DIM) * LOG2_E) /* of queries, so that weights are exp2 of scores */

struct FragmentRows {
    float sum[HEAD_DIM / 2], top[2], total[2]; /* of weighted values; scores are in units of ln 2 */
    int row[2], limit[2];                      /* the rows, and how many positions they see */

    /* `row` is the thread's first row. */
    __device__ __forceinline__ void reset(int first)
    {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row[half] = first + half * 8;
            top[half] = -INFINITE;
            total[half] = 0;
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) sum[i] = 0;
    }
};

/* Scores of COUNT / 4 * 8 keys from first_key on: those that a row does not see become -inf. */
template <int COUNT>
__device__ __forceinline__ void mask_scores(float (&score)[COUNT], const FragmentRows &state, int first_key)
{
    int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < COUNT; n++)
        if (first_key + n / 4 * 8 + t * 2 + n % 2 >= state.limit[n % 4 / 2]) score[n] = -INFINITE;
}

/* A step of the online softmax: scores become weights, and the sums so far are scaled to the new maximum. */
template <int COUNT>
__device__ __forceinline__ void softmax_step(float (&score)[COUNT], FragmentRows &state)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = state.top[half];
#pragma unroll
        for (int n = 0; n < COUNT / 4; n++)
            top = fmaxf(top, fmaxf(score[n * 4 + half * 2], score[n * 4 + half * 2 + 1]));
        top = quad_max(top);
        /* Before the first key the maximum is -inf, and nothing is scaled. */
        float factor = top == -INFINITE ? 1.0f : exp2f(state.top[half] - top);
        float base = top == -INFINITE ? 0.0f : top, total = 0;
        state.top[half] = top;
#pragma unroll
        for (int n = 0; n < COUNT / 4; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float p = exp2f(score[n * 4 + half * 2 + j] - base);
                score[n * 4 + half * 2 + j] = p;
                total += p;
            }
        state.total[half] = state.total[half] * factor + total;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
            state.sum[d * 4 + half * 2] *= factor;
            state.sum[d * 4 + half * 2 + 1] *= factor;
        }
    }
}

/* After the last step: until then each lane has added up its own weights, and codes' sums have VALUE_FACTOR. */
__device__ __forceinline__ void finish_totals(FragmentRows &state)
{
#pragma unroll
    for (int half = 0; half < 2; half++) state.total[half] = quad_sum(state.total[half]);
#if IS_CODED
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) state.sum[i] *= 1.0f / VALUE_FACTOR;
#endif
}

/* Normalised rows to o [tokens, heads, head_dim]. */
__device__ __forceinline__ void write_rows(const FragmentRows &state, Activation *o, const QueryRows &rows)
{
    int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = state.row[half];
        if (row >= rows.count) continue;
        unsigned *to = (unsigned *)(o + rows.index(row) * HEAD_DIM);
        float factor = 1.0f / state.total[half];
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
            to[d * 4 + t] =
                pack<Activation>(state.sum[d * 4 + half * 2] * factor, state.sum[d * 4 + half * 2 + 1] * factor);
    }
}

/* A part's rows first pass through shared memory, where each of a row's SPLITS warps or warpgroups, which had different
 * keys, leaves what it has of SPLIT_ROWS rows; then the threads add them up. */
#define SUM_STRIDE (HEAD_DIM + PART_PADDING)
#define SPLIT_FLOATS(split_rows) ((split_rows) * SUM_STRIDE + 2 * (split_rows)) /* sums, tops and totals */

/* `split` is the number of the warp or warpgroup, `row` the thread's first row of SPLIT_ROWS. Threads then need a
 * barrier. */
template <int SPLIT_ROWS>
__device__ __forceinline__ void stage_part(const FragmentRows &state, float *shared, int split, int row)
{
    int t = threadIdx.x % 4;
    float *sums = shared + split * SPLIT_FLOATS(SPLIT_ROWS);
    float *tops = sums + SPLIT_ROWS * SUM_STRIDE, *totals = tops + SPLIT_ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
            *(float2 *)(sums + row * SUM_STRIDE + d * 8 + t * 2) =
                make_float2(state.sum[d * 4 + half * 2], state.sum[d * 4 + half * 2 + 1]);
        if (t == 0) {
            tops[row] = state.top[half];
            totals[row] = state.total[half];
        }
    }
}

template <int SPLIT_ROWS, int SPLITS, int ROWS, int THREADS, int UNROLL>
__device__ __forceinline__ void write_part(const float *shared, const PartsView &parts, int part, const QueryRows &rows)
{
#pragma unroll UNROLL
    for (int i = threadIdx.x; i < ROWS * (HEAD_DIM / 4); i += THREADS) {
        int row = i / (HEAD_DIM / 4), channel = i % (HEAD_DIM / 4) * 4, index = row % SPLIT_ROWS;
        if (rows.first + row >= rows.count) break;
        const float *splits = shared + row / SPLIT_ROWS * SPLITS * SPLIT_FLOATS(SPLIT_ROWS);
        const float *tops = splits + SPLIT_ROWS * SUM_STRIDE, *totals = tops + SPLIT_ROWS;
        float top = -INFINITE, total = 0;
        float4 sum = zero4();
#pragma unroll
        for (int s = 0; s < SPLITS; s++) top = fmaxf(top, tops[s * SPLIT_FLOATS(SPLIT_ROWS) + index]);
        float base = top == -INFINITE ? 0.0f : top;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            int split = s * SPLIT_FLOATS(SPLIT_ROWS);
            float factor = exp2f(tops[split + index] - base);
            total += totals[split + index] * factor;
            accumulate(sum, *(const float4 *)(splits + split + index * SUM_STRIDE + channel), factor);
        }
        row += rows.first;
        size_t at = rows.index(part * parts.tokens + row / rows.group, row);
        *(float4 *)(parts.o + at * HEAD_DIM + channel) = sum;
        if (channel == 0) {
            parts.tops[at] = top * LN_2;
            parts.totals[at] = total;
        }
    }
}

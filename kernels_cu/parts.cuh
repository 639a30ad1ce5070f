/* Attention over the prefix as its kernels leave it: unnormalised o [parts, tokens, heads, head_dim],
 * maximum and sum of the weights [parts, tokens, heads]. A part that saw no key has a maximum of -inf, and
 * zeros. */
#define BATCH 16

struct Parts {
    const float *o, *tops, *totals;
    int count;
    size_t rows; /* tokens * heads */

    /* Maximum, sum of weights relative to it, and that of weighted values of one channel. Of a batch of parts
     * all loads are under way at once. */
    __device__ __forceinline__ void merge(size_t row, int channel, int head_dim, float &top, float &total,
                                          float &sum) const
    {
        top = -INFINITE, total = 0, sum = 0;
        for (int first = 0; first < count; first += BATCH) {
            float tops_there[BATCH], totals_there[BATCH], values[BATCH], highest = top;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                bool there = first + i < count;
                size_t at = (size_t)(first + i) * rows + row;
                tops_there[i] = there ? tops[at] : -INFINITE;
                totals_there[i] = there ? totals[at] : 0.0f;
                values[i] = there ? o[at * head_dim + channel] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) highest = fmaxf(highest, tops_there[i]);
            /* Parts of which all scores were NaN have a maximum of -inf too: their NaN must stay. */
            float base = highest == -INFINITE ? 0.0f : highest, factor = expf(top - base);
            top = highest, total *= factor, sum *= factor;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                factor = expf(tops_there[i] - base);
                total += totals_there[i] * factor;
                sum += values[i] * factor;
            }
        }
    }
};

/* Of a row's merged parts, one channel of o and the log-sum-exp; over an empty prefix zeros and -inf. */
__device__ __forceinline__ void store_merged(float *o, float *lse, size_t row, int channel, int head_dim, float top,
                                             float total, float sum)
{
    o[row * head_dim + channel] = total == 0 ? 0.0f : sum / total;
    if (channel == 0) lse[row] = total == 0 ? -INFINITE : top + logf(total);
}

#define PARTS_PARAMETERS const float *parts_o, const float *parts_tops, const float *parts_totals, int parts_count
#define PARTS_OF(rows) \
    Parts { parts_o, parts_tops, parts_totals, parts_count, rows }

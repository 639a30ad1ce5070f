/* Merges the parts of attention over the prefix. A part that saw no key has a maximum of -inf, and zeros. One warp per
 * row, whose lanes have pieces of 4 channels. */
#ifndef PART_BATCH
#define PART_BATCH 16
#endif

/* Attention of a row over some keys, not normalised yet. */
struct RowResult {
    float top, total; /* the highest score, and the sum of weights relative to it */
    float4 sum;       /* of weighted values: a lane's piece */
};

/* Of a cache's parts, row `row` of rows = parts.tokens * heads. All loads of a batch of parts are in flight at once:
 * values in each lane, and one part's maximum and sum. */
__device__ __forceinline__ RowResult merge_row(const PartsView &parts, int cache, size_t row, size_t rows, int piece,
                                               int head_dim)
{
    int lane = threadIdx.x % WARP, before_first = parts.first_part(cache);
    int count = parts.first_part(cache + 1) - before_first;
    row += before_first * rows;
    RowResult merged = {-INFINITE, 0, zero4()};
#pragma unroll 1
    for (int first = 0; first < count; first += PART_BATCH) {
        bool mine = lane < PART_BATCH && first + lane < count;
        size_t at = (size_t)(first + lane) * rows + row;
        float top = mine ? parts.tops[at] : -INFINITE, total = mine ? parts.totals[at] : 0.0f;
        float4 values[PART_BATCH];
#pragma unroll
        for (int i = 0; i < PART_BATCH; i++)
            values[i] = first + i < count
                            ? ((const float4 *)(parts.o + ((size_t)(first + i) * rows + row) * head_dim))[piece]
                            : zero4();
        float highest = fmaxf(merged.top, warp_max(top));
        /* Parts whose scores were all NaN have a maximum of -inf too: their NaN must survive. */
        float base = highest == -INFINITE ? 0.0f : highest;
        float before = expf(merged.top - base), factor = expf(top - base);
        merged.top = highest;
        merged.total = merged.total * before + warp_sum(total * factor);
        merged.sum = scaled(merged.sum, before);
#pragma unroll
        for (int i = 0; i < PART_BATCH; i++) accumulate(merged.sum, values[i], __shfl_sync(~0u, factor, i));
    }
    return merged;
}

/* A lane's piece of o, and the log-sum-exp; over an empty prefix zeros and -inf. */
__device__ __forceinline__ void store_merged(float *o, float *lse, size_t row, int piece, int head_dim,
                                             const RowResult &merged)
{
    float scale = merged.total == 0 ? 0.0f : 1 / merged.total;
    ((float4 *)(o + row * head_dim))[piece] = scaled(merged.sum, scale);
    if (piece == 0) lse[row] = merged.total == 0 ? -INFINITE : merged.top + logf(merged.total);
}

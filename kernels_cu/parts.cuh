/* Attention over the prefix as its kernels leave it: unnormalised o [parts, tokens, heads, head_dim],
 * maximum and sum of the weights [parts, tokens, heads]. A part that saw no key has a maximum of -inf, and
 * zeros. A row is merged by a warp, whose lanes have pieces of 4 channels. */
#define BATCH 16

/* Attention of a row over some keys, not normalised yet. */
struct RowResult {
    float top, total; /* the highest score, and the sum of weights relative to it */
    float4 sum;       /* of weighted values: a lane's piece */
};

struct Parts {
    const float *o, *tops, *totals;
    int count;
    size_t rows; /* tokens * heads */

    /* Of a batch of parts all loads are under way at once: values in each lane, and one part's maximum and sum. */
    __device__ __forceinline__ RowResult merge(size_t row, int piece, int head_dim) const
    {
        int lane = threadIdx.x % WARP;
        RowResult merged = {-INFINITE, 0, make_float4(0, 0, 0, 0)};
#pragma unroll 1
        for (int first = 0; first < count; first += BATCH) {
            bool mine = lane < BATCH && first + lane < count;
            size_t at = (size_t)(first + lane) * rows + row;
            float top = mine ? tops[at] : -INFINITE, total = mine ? totals[at] : 0.0f;
            float4 values[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                values[i] = first + i < count
                                ? ((const float4 *)(o + ((size_t)(first + i) * rows + row) * head_dim))[piece]
                                : make_float4(0, 0, 0, 0);
            float highest = fmaxf(merged.top, warp_max(top));
            /* Parts of which all scores were NaN have a maximum of -inf too: their NaN must stay. */
            float base = highest == -INFINITE ? 0.0f : highest;
            float before = expf(merged.top - base), factor = expf(top - base);
            merged.top = highest;
            merged.total = merged.total * before + warp_sum(total * factor);
            merged.sum.x *= before, merged.sum.y *= before, merged.sum.z *= before, merged.sum.w *= before;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                float weight = __shfl_sync(~0u, factor, i);
                merged.sum.x += values[i].x * weight, merged.sum.y += values[i].y * weight;
                merged.sum.z += values[i].z * weight, merged.sum.w += values[i].w * weight;
            }
        }
        return merged;
    }
};

/* A lane's piece of o, and the log-sum-exp; over an empty prefix zeros and -inf. */
__device__ __forceinline__ void store_merged(float *o, float *lse, size_t row, int piece, int head_dim,
                                             const RowResult &merged)
{
    float scale = merged.total == 0 ? 0.0f : 1 / merged.total;
    ((float4 *)(o + row * head_dim))[piece] =
        make_float4(merged.sum.x * scale, merged.sum.y * scale, merged.sum.z * scale, merged.sum.w * scale);
    if (piece == 0) lse[row] = merged.total == 0 ? -INFINITE : merged.top + logf(merged.total);
}

#define PARTS_PARAMETERS const float *parts_o, const float *parts_tops, const float *parts_totals, int parts_count
#define PARTS_OF(rows) \
    Parts { parts_o, parts_tops, parts_totals, parts_count, rows }

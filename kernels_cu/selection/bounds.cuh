/* What kernels that score pages by their bounds share. */

/* The row's index among the rows [tokens, heads] of q; -1 for a negative token and past the last row. Row r of a kv
 * head is head r % group of its group, of token tokens[r / group]; with tokens null, of token r / group. */
__device__ __forceinline__ int query_index(const int *tokens, int row, int rows, int kv_head, int group, int heads)
{
    int token = row >= rows ? -1 : tokens ? tokens[row / group] : row / group;
    return token < 0 ? -1 : token * heads + kv_head * group + row % group;
}

/* Channel c of 2 * head_dim of a query as it meets the bounds: min(q, 0) the smallest keys, max(q, 0) the largest, so
 * that QUEST's bound is a dot product. */
__device__ __forceinline__ float query_for_bounds(const float *q, int c, int head_dim)
{
    return c < head_dim ? fminf(q[c], 0.0f) : fmaxf(q[c - head_dim], 0.0f);
}

/* Called by all thread blocks of a grid (kv_heads, splits, any): clears the kv head's marks. */
__device__ __forceinline__ void clear_marks(unsigned *marks, int words, int kv_head)
{
    if (blockIdx.z == 0)
        for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < words; i += gridDim.y * blockDim.x)
            marks[(size_t)kv_head * words + i] = 0;
}

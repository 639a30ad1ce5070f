/* What kernels that score pages by their bounds share. */

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

/* Bounds of pages, and the marks that the kernels of bounds clear.
 *
 * Where the bounds of a cache's pages lie: the address of each chunk [layers, kv_heads, pages of the chunk,
 * 2 (smallest, largest), head_dim] of Held. */
struct BoundsView {
    const unsigned long long *chunks;
    int layer, kv_heads, chunk_pages, head_dim;

    /* 2 * head_dim values. */
    __device__ __forceinline__ Held *page(int head, int page) const
    {
        size_t row = ((size_t)layer * kv_heads + head) * chunk_pages + page % chunk_pages;
        return (Held *)chunks[page / chunk_pages] + row * 2 * head_dim;
    }
};

#define BOUNDS_PARAMETERS \
    const unsigned long long *bounds_chunks, const int *cache_length, int bounds_layer, int bounds_kv_heads, \
        int page_size, int bounds_chunk_positions, int bounds_head_dim
#define BOUNDS_VIEW \
    BoundsView { bounds_chunks, bounds_layer, bounds_kv_heads, bounds_chunk_positions / page_size, bounds_head_dim }

/* Channel c of 2 * head_dim of a query as it meets the bounds: min(q, 0) the smallest keys, max(q, 0) the
 * largest, so that QUEST's bound is a product. */
__device__ __forceinline__ float facing(const float *q, int c, int head_dim)
{
    return c < head_dim ? fminf(q[c], 0.0f) : fmaxf(q[c - head_dim], 0.0f);
}

/* By all thread blocks of a grid (kv_heads, splits, any): the kv head's marks become 0. */
__device__ __forceinline__ void clear_marks(unsigned *marks, int words, int kv_head)
{
    if (blockIdx.z == 0)
        for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < words; i += gridDim.y * blockDim.x)
            marks[(size_t)kv_head * words + i] = 0;
}

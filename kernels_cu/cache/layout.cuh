/* Layout of a KV cache's chunks.
 *
 *     kv chunk      [layers, 2 (keys, values), kv_heads, chunk_positions, head_dim] of KVValue
 *     bounds chunk  [layers, kv_heads, pages of the chunk, 2 (smallest, largest), head_dim] of KVValue
 *
 * Positions of a kv head are contiguous in groups of 8. With 16-bit values and head_dim a multiple of 64, a group is
 * [head_dim / 64][8 positions][64 channels], and the 16-byte pieces of its 128-byte rows are swizzled: piece p of
 * position r is at p ^ r. That is the layout that tensor cores read from shared memory without bank conflicts, so that
 * plain copies bring pages there. */
enum { CACHED_KEYS, CACHED_VALUES };

/* The group of 8 positions that begins at `position`; the groups after it in the chunk follow. */
__device__ __forceinline__ KVValue *CacheView::group(int kind, int head, int position) const
{
    size_t rows = ((size_t)(layer * 2 + kind) * kv_heads + head) * chunk_positions + position % chunk_positions;
    return (KVValue *)kv_chunks[position / chunk_positions] + rows / 8 * 8 * head_dim;
}

__device__ __forceinline__ KVValue *CacheView::at(int kind, int head, int position, int channel) const
{
    int row = position % 8, index = row * head_dim + channel;
    if (sizeof(KVValue) == 2 && head_dim % 64 == 0)
        index = channel / 64 * 512 + row * 64 + ((channel % 64 / 8) ^ row) * 8 + channel % 8;
    return group(kind, head, position) + index;
}

__device__ __forceinline__ int CacheView::chunk_pages() const { return chunk_positions / page_size; }

/* A page's smallest and largest keys: 2 * head_dim values. Kernels compute chunk_pages once: it takes a division. */
__device__ __forceinline__ KVValue *CacheView::bounds(int head, int page, int chunk_pages) const
{
    size_t row = ((size_t)layer * kv_heads + head) * chunk_pages + page % chunk_pages;
    return (KVValue *)bound_chunks[page / chunk_pages] + row * 2 * head_dim;
}

/* Pages that hold so many positions. */
__device__ __forceinline__ int CacheView::pages(int positions) const { return (positions + page_size - 1) / page_size; }

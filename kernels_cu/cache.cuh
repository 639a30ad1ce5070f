/* Where a cache's pages lie: the address of each chunk [layers, 2 (keys, values), kv_heads,
 * chunk_positions, head_dim], and how many positions are committed. Read from device memory, so
 * that a captured pass sees the cache as it is when it runs.
 *
 * A kv head's positions are contiguous in groups of 8. With 16-bit values and head_dim a multiple of
 * 64 a group is [head_dim / 64][8 positions][64 channels], and the 16-byte pieces of its rows of 128
 * bytes are exchanged: piece p of position r is at p ^ r. That is the layout that tensor cores want
 * in shared memory (no bank is met twice), so that pages get there by plain copies. */
struct CacheView {
    const unsigned long long *chunks;
    const int *length;
    int layer, kv_heads, chunk_positions, head_dim;

    /* The group of 8 positions, or the first of more of them within a chunk. */
    __device__ __forceinline__ Held *group(int value, int head, int position) const
    {
        size_t rows = ((size_t)(layer * 2 + value) * kv_heads + head) * chunk_positions + position % chunk_positions;
        return (Held *)chunks[position / chunk_positions] + rows / 8 * 8 * head_dim;
    }

    __device__ __forceinline__ Held *at(int value, int head, int position, int channel) const
    {
        int row = position % 8, place = row * head_dim + channel;
#if LOSART_DTYPE
        if (head_dim % 64 == 0)
            place = channel / 64 * 512 + row * 64 + ((channel % 64 / 8) ^ row) * 8 + channel % 8;
#endif
        return group(value, head, position) + place;
    }
};

/* Which positions rows see: the whole prefix, or those of a list of pages, one after the other. */
struct Whole {
    __device__ __forceinline__ int operator()(int place) const { return place; }
};

struct Listed {
    const int *pages;
    int page_size;
    __device__ __forceinline__ int operator()(int place) const
    {
        return pages[place / page_size] * page_size + place % page_size;
    }
};

/* A kernel's parameters that make up a CacheView, and the view made of them. */
#define CACHE_PARAMETERS                                                                          \
    const unsigned long long *cache_chunks, const int *cache_length, int cache_layer, int cache_kv_heads, \
        int cache_chunk_positions, int cache_head_dim
#define CACHE_VIEW \
    CacheView { cache_chunks, cache_length, cache_layer, cache_kv_heads, cache_chunk_positions, cache_head_dim }

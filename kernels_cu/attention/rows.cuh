/* Which queries and positions an attention kernel works on. */

/* A thread block's query rows: those of a kv head, `count` in all, from number `first` on. All query heads that share
 * the kv head go through it together: row r is head r % group of the group, of token r / group. */
struct QueryRows {
    int first, kv_head, heads, group, count;

    __device__ __forceinline__ QueryRows(int first, int tokens, int kv_head, int heads, const CacheView &cache)
        : first(first), kv_head(kv_head), heads(heads), group(heads / cache.kv_heads), count(tokens * group)
    {
    }

    /* The row's index among [tokens, heads]; of another token with its head. */
    __device__ __forceinline__ size_t index(int row) const { return index(row / group, row); }
    __device__ __forceinline__ size_t index(int token, int row) const
    {
        return (size_t)token * heads + kv_head * group + row % group;
    }

    /* How many positions a row sees by block-causal attention, if token 0 is at position `length`. */
    __device__ __forceinline__ int causal_limit(int row, int length, int block_length) const
    {
        return ((length + row / group) / block_length + 1) * block_length;
    }
};

/* What a thread block of prefix attention works on: which part, of how many, of which cache. */
struct PrefixPart {
    int cache, part, parts;

    /* owners [gridDim.y]: the cache of each part, -1 for none; null: all parts are of one cache. */
    __device__ __forceinline__ PrefixPart(const PartsView &all, const int *owners)
        : cache(owners ? owners[blockIdx.y] : 0), part(blockIdx.y), parts(gridDim.y)
    {
        if (!owners || cache < 0) return;
        int first = all.first[cache];
        part -= first, parts = all.first[cache + 1] - first;
    }
};

/* How much of one cache a pass's rows see: the sequences' prefixes, ascending, the last of which has all. What is
 * beyond the first is written in this pass, by a kernel before. */
struct Prefixes {
    const int *lengths;
    int sequence_rows, last_row, first, all;

    __device__ __forceinline__ Prefixes(const CacheView &cache, const QueryRows &rows, int sequences)
        : lengths(cache.length), sequence_rows(rows.count / sequences), last_row(rows.count - 1), first(lengths[0]),
          all(lengths[sequences - 1])
    {
    }

    __device__ __forceinline__ int limit(int row) const { return lengths[min(row, last_row) / sequence_rows]; }

    /* Whether positions before `end` were in the cache before the pass began. */
    __device__ __forceinline__ bool committed(int end) const { return min(end, all) <= first; }
};

/* Positions by their index: those of the whole prefix, or of listed pages one after the other. */
struct WholePrefix {
    __device__ __forceinline__ int operator()(int index) const { return index; }
};

struct ListedPages {
    const int *pages;
    int page_size;
    __device__ __forceinline__ int operator()(int index) const
    {
        return pages[index / page_size] * page_size + index % page_size;
    }
};

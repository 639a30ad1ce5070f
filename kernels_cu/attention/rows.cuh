/* Which queries and positions an attention kernel works on. All query heads that share a kv head go through it
 * together: its row r is head r % group of the group, of token r / group. */

/* The row's index among [tokens, heads]. */
__device__ __forceinline__ size_t query_row(int token, int row, int kv_head, int group, int heads)
{
    return (size_t)token * heads + kv_head * group + row % group;
}

__device__ __forceinline__ size_t query_row(int row, int kv_head, int group, int heads)
{
    return query_row(row / group, row, kv_head, group, heads);
}

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

/* What part number `part` takes of some tiles. */
struct TileRange {
    int first, last;
};

__device__ __forceinline__ TileRange tiles_of_part(int tiles, int part, int parts)
{
    return {(int)((long long)tiles * part / parts), (int)((long long)tiles * (part + 1) / parts)};
}

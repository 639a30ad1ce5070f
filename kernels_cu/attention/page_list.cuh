/* A kv head's list of pages, as a thread block of sparse attention needs it.
 *
 * Each thread block first makes its share of the list in shared memory: the pages that hold its tiles. Pages are
 * ascending, and only the prefix's last page can be partly filled, so that a list is like a prefix of its own. */

/* The kv head's pages that a sequence's rows selected; null where there are marks. They were selected before this pass
 * began, and can come into the L2 cache while the previous kernel runs. */
__device__ __forceinline__ const int *prefetch_top(const PagesView &pages, int sequence, int kv_head)
{
    const int *top = pages.top.of<int>(sequence);
    if (top) top += (size_t)kv_head * pages.rows * pages.count;
    for (int i = threadIdx.x * 32; top && i < pages.rows * pages.count; i += blockDim.x * 32)
        asm volatile("prefetch.global.L2 [%0];" : : "l"(top + i));
    return top;
}

/* Of so many tokens those that have queries: the first ones, negative ones follow. */
__device__ __forceinline__ int active_tokens(const int *tokens, int count)
{
    int active = 0;
    for (int i = threadIdx.x % WARP; i < count; i += WARP) active += !tokens || tokens[i] >= 0;
    return __reduce_add_sync(~0u, active);
}

struct PageShare {
    int active; /* tokens that read the pages */
    int listed; /* positions in all pages of the list */
    TileRange tiles;
    ListedPages where;
};

/* A thread block's share. Called by all threads of a block of whole warps. `shared` has room for `capacity` pages, the
 * largest share, and after that, with `top`, for marks of the prefix's pages. tokens [rows.count / rows.group] are
 * those of the rows (null: all). Nothing is shared where no token of the thread block's rows is active. */
__device__ __forceinline__ PageShare share_pages(const PagesView &pages, const int *top, const int *tokens,
                                                 const QueryRows &rows, const SequenceShare &mine,
                                                 const CacheView &cache, int tile, int *shared, int capacity)
{
    __shared__ int sums[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int length = *cache.length, page_size = cache.page_size, kv_heads = cache.kv_heads;
    int page_count = cache.pages(length), words = (page_count + WARP - 1) / WARP;
    const unsigned *marks = pages.marks + ((size_t)mine.sequence * kv_heads + rows.kv_head) * pages.words;
    /* Each thread has some consecutive words; the first is on its way while the tokens are. */
    int each = (words + blockDim.x - 1) / blockDim.x, begin = min(words, (int)threadIdx.x * each);
    int end = min(words, begin + each), set = 0;
    unsigned first_word = !top && begin < end ? marks[begin] : 0;
    PageShare share;
    share.active = active_tokens(tokens, rows.count / rows.group);
    if (rows.first >= share.active * rows.group) return share;
    if (top) {
        unsigned *own = (unsigned *)shared + capacity;
        for (int i = threadIdx.x; i < words; i += blockDim.x) own[i] = 0;
        __syncthreads();
        int wanted = (tokens ? share.active * rows.group : pages.rows) * pages.count;
        for (int i = threadIdx.x; i < wanted; i += blockDim.x) {
            int row = i / pages.count;
            if (tokens) row = tokens[row / rows.group] * rows.group + row % rows.group;
            int page = top[row * pages.count + i % pages.count];
            if (page >= 0) atomicOr(own + page / WARP, 1u << page % WARP);
        }
        __syncthreads();
        marks = own;
        if (begin < end) first_word = own[begin];
    }
    auto word_at = [&](int i) { return i == begin ? first_word : marks[i]; };
    for (int i = begin; i < end; i++) set += __popc(word_at(i));
    int through = set; /* pages of this and earlier lanes */
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(~0u, through, step);
        if (lane >= step) through += other;
    }
    if (lane == WARP - 1) sums[warp] = through;
    bool has_last = page_count && (marks[(page_count - 1) / WARP] >> (page_count - 1) % WARP & 1);
    __syncthreads();
    int warp_pages = lane < blockDim.x / WARP ? sums[lane] : 0, count = __reduce_add_sync(~0u, warp_pages);
    int index = through - set + __reduce_add_sync(~0u, lane < warp ? warp_pages : 0);

    share.listed = count * page_size + (has_last ? length - page_count * page_size : 0);
    share.tiles = tiles_of_part((share.listed + tile - 1) / tile, mine.part, mine.parts);
    int first_page = share.tiles.first * tile / page_size;
    int last_page = min(count, (share.tiles.last * tile + page_size - 1) / page_size);
    for (int i = begin; i < end && index < last_page; i++)
        for (unsigned word = word_at(i); word; word &= word - 1, index++)
            if (index >= first_page && index < last_page) shared[index - first_page] = i * WARP + __ffs(word) - 1;
    __syncthreads();
    share.where = {shared - first_page, page_size};
    return share;
}

/* Adds the positions in the kv heads' lists to reads[0], and the tokens that read them to reads[1]. */
__device__ __forceinline__ void count_reads(int *reads, const PageShare &share, const QueryRows &rows, int part)
{
    if (part + rows.first || threadIdx.x) return;
    atomicAdd(reads, share.listed);
    if (blockIdx.x == 0) atomicAdd(reads + 1, share.active);
}

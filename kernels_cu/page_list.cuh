/* A kv head's list of pages, as a thread block of sparse attention wants it.
 *
 * It is given as marks [kv_heads, words], a bit a page, or as what rows have selected: selected [kv_heads, rows,
 * count], -1 for none, of which those of some tokens count. Either way a thread block first makes its share of the
 * list, in shared memory: the pages that hold its tiles. Pages rise, and only the prefix's last page can be part full,
 * so that a list is a prefix of its own. */
struct PageChoice {
    const unsigned *marks;
    int words;
    const int *selected;
    int rows, count;
};

#define PAGES_PARAMETERS \
    const unsigned *page_marks, int page_words, const int *pages_selected, int selected_rows, int selected_count, \
        int page_size, int *positions_read
#define PAGES_CHOSEN \
    PageChoice { page_marks, page_words, pages_selected, selected_rows, selected_count }

/* What rows have selected was there before the pass began: it comes closer while the kernel before still runs. */
__device__ __forceinline__ void prefetch_selected(const PageChoice &choice, int kv_head)
{
    const int *selected = choice.selected + (size_t)kv_head * choice.rows * choice.count;
    for (int i = threadIdx.x * 32; choice.selected && i < choice.rows * choice.count; i += blockDim.x * 32)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(selected + i));
}

struct PageShare {
    int listed, first, last; /* positions in all pages of the list; tiles of this thread block */
    Listed where;
};

/* By all threads of a block, whole warps. `shared` has room for the share, and for `words` after that where rows have
 * selected; tokens [token_count] are the rows' (null: all), `group` rows each. */
__device__ __forceinline__ PageShare share_pages(const PageChoice &choice, int kv_head, const int *tokens,
                                                 int token_count, int group, int length, int page_size,
                                                 int tile, int *shared, int capacity)
{
    __shared__ int sums[WARP];
    int part = blockIdx.y, parts = gridDim.y, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int pages = (length + page_size - 1) / page_size, words = (pages + WARP - 1) / WARP;
    const unsigned *marks = choice.marks + (size_t)kv_head * choice.words;
    if (choice.selected) {
        unsigned *own = (unsigned *)shared + capacity;
        for (int i = threadIdx.x; i < words; i += blockDim.x) own[i] = 0;
        __syncthreads();
        const int *selected = choice.selected + (size_t)kv_head * choice.rows * choice.count;
        int wanted = (tokens ? token_count * group : choice.rows) * choice.count;
        for (int i = threadIdx.x; i < wanted; i += blockDim.x) {
            int row = i / choice.count, token = tokens ? tokens[row / group] : 0;
            if (tokens) row = token * group + row % group;
            int page = token < 0 ? -1 : selected[row * choice.count + i % choice.count];
            if (page >= 0) atomicOr(own + page / WARP, 1u << page % WARP);
        }
        __syncthreads();
        marks = own;
    }
    /* A thread has some words in a row. */
    int each = (words + blockDim.x - 1) / blockDim.x, begin = min(words, (int)threadIdx.x * each);
    int end = min(words, begin + each), mine = 0;
    for (int i = begin; i < end; i++) mine += __popc(marks[i]);
    int before = mine;
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += other;
    }
    if (lane == WARP - 1) sums[warp] = before;
    bool cut = pages && (marks[(pages - 1) / WARP] >> (pages - 1) % WARP & 1);
    __syncthreads();
    int there = lane < blockDim.x / WARP ? sums[lane] : 0, count = __reduce_add_sync(~0u, there);
    int place = before - mine + __reduce_add_sync(~0u, lane < warp ? there : 0);

    PageShare share;
    share.listed = count * page_size + (cut ? length - pages * page_size : 0);
    long long tiles = (share.listed + tile - 1) / tile;
    share.first = (int)(tiles * part / parts), share.last = (int)(tiles * (part + 1) / parts);
    int first_page = share.first * tile / page_size;
    int last_page = min(count, (share.last * tile + page_size - 1) / page_size);
    for (int i = begin; i < end && place < last_page; i++)
        for (unsigned word = marks[i]; word; word &= word - 1, place++)
            if (place >= first_page && place < last_page) shared[place - first_page] = i * WARP + __ffs(word) - 1;
    __syncthreads();
    share.where = {shared - first_page, page_size};
    return share;
}

/* Marked pages of each kv head as a list, and the marks wiped away.
 *
 * marks [kv_heads, words], a bit a page. Before, the pages that some rows have selected are marked: selected
 * [kv_heads, rows, count], -1 for none, of the rows of tokens[0], ..., tokens[token_count - 1], `group` each
 * (negative tokens are none, tokens null: all rows); nothing where selected is null. ids [kv_heads, capacity]
 * gets the pages, rising; counts [kv_heads] how many; *positions rises by those that they hold.
 *
 * Grid: kv_heads, 1024 threads. Moves the marks in and out. */
#define THREADS 1024

extern "C" __global__ void __launch_bounds__(THREADS)
    list_pages(unsigned *marks, int words, const int *selected, int rows, int count, const int *tokens,
               int token_count, int group, const int *cache_length, int page_size, int *ids, int capacity,
               int *counts, int *positions)
{
    __shared__ int sums[2][WARP];
    wait_for_previous();
    let_next_start();
    int kv_head = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, length = *cache_length;
    int pages = (length + page_size - 1) / page_size;
    marks += (size_t)kv_head * words;
    ids += (size_t)kv_head * capacity;
    if (selected) {
        int wanted = tokens ? token_count * group : rows;
        for (int i = threadIdx.x; i < wanted * count; i += THREADS) {
            int row = i / count, token = tokens ? tokens[row / group] : 0;
            if (token < 0) continue;
            if (tokens) row = token * group + row % group;
            int page = selected[((size_t)kv_head * rows + row) * count + i % count];
            if (page >= 0) atomicOr(marks + page / WARP, 1u << page % WARP);
        }
        __syncthreads();
    }
    const volatile unsigned *marked = marks;
    int filled = 0;
    for (int base = 0, turn = 0; base * WARP < pages; base += THREADS, turn ^= 1) {
        int at = base + threadIdx.x;
        unsigned word = at < words ? marked[at] : 0;
        if (word) marks[at] = 0;
        int mine = __popc(word), before = mine;
        for (int step = 1; step < WARP; step *= 2) {
            int other = __shfl_up_sync(~0u, before, step);
            if (lane >= step) before += other;
        }
        if (lane == WARP - 1) sums[turn][warp] = before;
        __syncthreads();
        int there = sums[turn][lane], place = filled + before - mine + __reduce_add_sync(~0u, lane < warp ? there : 0);
        filled += __reduce_add_sync(~0u, there);
        for (; word; word &= word - 1) ids[place++] = at * WARP + __ffs(word) - 1;
        /* The last page may be part full. */
        if (at == (pages - 1) / WARP && mine && place && ids[place - 1] == pages - 1)
            atomicAdd(positions, length - pages * page_size);
    }
    if (threadIdx.x == 0) {
        counts[kv_head] = filled;
        atomicAdd(positions, filled * page_size);
    }
}

/* The pages that some rows have selected, united per kv head.
 *
 * selected [kv_heads, rows, count], -1 for none; of the rows of tokens[0], ..., tokens[token_count - 1], `group` each
 * (negative tokens are none, tokens null: all rows). marks [kv_heads, words], a bit a page, are 0 between launches.
 * ids [kv_heads, capacity] gets the pages, rising; counts [kv_heads] how many; *positions rises by those that they
 * hold.
 *
 * Grid: kv_heads, 1024 threads. Moves the rows in, and the marks in and out. */
#define THREADS 1024

extern "C" __global__ void __launch_bounds__(THREADS)
    list_pages(const int *selected, int rows, int count, const int *tokens, int token_count, int group,
               const int *cache_length, int page_size, int *ids, int capacity, unsigned *marks, int words, int *counts,
               int *positions)
{
    __shared__ int sums[2][WARP];
    wait_for_previous();
    let_next_start();
    int kv_head = blockIdx.x, length = *cache_length, pages = (length + page_size - 1) / page_size;
    marks += (size_t)kv_head * words;
    ids += (size_t)kv_head * capacity;
    int wanted = tokens ? token_count * group : rows;
    for (int i = threadIdx.x; i < wanted * count; i += THREADS) {
        int row = i / count, token = tokens ? tokens[row / group] : 0;
        if (token < 0) continue;
        if (tokens) row = token * group + row % group;
        int page = selected[((size_t)kv_head * rows + row) * count + i % count];
        if (page >= 0) atomicOr(marks + page / WARP, 1u << page % WARP);
    }
    __syncthreads();
    list_marked(marks, pages, length, page_size, ids, counts + kv_head, positions, sums);
}

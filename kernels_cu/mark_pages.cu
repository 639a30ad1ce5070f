/* The `count` pages of highest score of each row, united per kv head.
 *
 * scores [kv_heads, rows, stride]; rows of a token tokens[row / group] < 0 select none. marks [kv_heads, words] gets
 * a bit a page; the kernel before has made them 0.
 * Grid: (rows, kv_heads), 512 threads. Moves the scores in. */
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mark_pages(const float *scores, int stride, const int *cache_length, int page_size, const int *tokens, int group,
               int count, unsigned *marks, int words)
{
    int row = blockIdx.x, rows = gridDim.x, kv_head = blockIdx.y, pages = (*cache_length + page_size - 1) / page_size;
    bool wanted = !tokens || tokens[row / group] >= 0; /* the scores' kernel has waited for the tokens */
    wait_for_previous();
    let_next_start();
    if (!wanted) return;
    scores += ((size_t)kv_head * rows + row) * stride;
    marks += (size_t)kv_head * words;
    choose_top(pages, count, [&](int page) { return rising(scores[page]); },
               [&](int page) { atomicOr(marks + page / WARP, 1u << page % WARP); });
}

/* The `count` pages of highest score of each row, united per kv head.
 *
 * scores [kv_heads, rows, stride]; rows of a token tokens[row / group] < 0 choose none. Sets bits of marks
 * [kv_heads, words], one per page, which the previous kernel has cleared. Thread blocks of such rows leave room for
 * others at once, and come last; those of row 0 stay, since a kernel must wait for the one before it.
 *
 * Grid: (kv_heads, rows). Must read the scores once. */
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mark_pages(const float *scores, int stride, CacheView cache, const int *tokens, int group, int count,
               unsigned *marks, int words)
{
    int kv_head = blockIdx.x, row = blockIdx.y, rows = gridDim.y, pages = cache.pages(*cache.length);
    bool chooses = !tokens || tokens[row / group] >= 0; /* page_scores has waited for the tokens */
    if (!chooses && row) return;
    wait_for_previous();
    let_next_start();
    if (!chooses) return;
    scores += ((size_t)kv_head * rows + row) * stride;
    marks += (size_t)kv_head * words;
    choose_top(
        pages, count, [&](int page) { return page_key(scores[page]); },
        [&](int page) { atomicOr(marks + page / WARP, 1u << page % WARP); });
}

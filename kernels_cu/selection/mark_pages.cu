/* The `count` pages of highest score of each row, united per kv head.
 *
 * scores [sequences, kv_heads, rows, stride]; rows of a token tokens[row / group] < 0 choose none. Sets bits of marks
 * [sequences, kv_heads, words], one per page, which the previous kernel has cleared. Thread blocks of such rows leave
 * room for others at once, and come last; those of row 0 stay, since a kernel must wait for the one before it.
 *
 * Grid: (kv_heads, rows, sequences). Must read the scores once. */
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mark_pages(const float *scores, int stride, CachesView caches, const int *tokens, int group, int count,
               unsigned *marks, int words)
{
    int row = blockIdx.y, rows = gridDim.y, sequence = blockIdx.z;
    size_t head = (size_t)sequence * gridDim.x + blockIdx.x;
    CacheView cache = caches.of(sequence);
    int pages = cache.pages(*cache.length);
    /* page_scores has waited for the tokens */
    bool chooses = !tokens || tokens[sequence * (rows / group) + row / group] >= 0;
    if (!chooses && row) return;
    wait_for_previous();
    let_next_start();
    if (!chooses) return;
    scores += (head * rows + row) * stride;
    marks += head * words;
    choose_top(
        pages, count, [&](int page) { return page_key(scores[page]); },
        [&](int page) { atomicOr(marks + page / WARP, 1u << page % WARP); });
}

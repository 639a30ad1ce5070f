/* The `count` pages of highest score of each of the rows, united per kv head.
 *
 * scores [sequences, kv_heads, rows, stride]; rows of a token tokens[row / group] < 0 choose none, and come last. Sets
 * bits of marks [sequences, kv_heads, words], one per page, which the previous kernel has cleared. Thread blocks whose
 * rows choose none leave room for others at once; those of row 0 stay, since a kernel must wait for the one before it.
 *
 * Grid: (kv_heads, any number up to the rows, which it divides among them, sequences). Must read the scores once. */
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mark_pages(const float *scores, int rows, int stride, CachesView caches, const int *tokens, int group, int count,
               unsigned *marks, int words)
{
    int row = blockIdx.y, sequence = blockIdx.z;
    size_t head = (size_t)sequence * gridDim.x + blockIdx.x;
    CacheView cache = caches.of(sequence);
    int pages = cache.pages(*cache.length);
    /* page_scores has waited for the tokens */
    auto chooses = [&](int row) { return !tokens || tokens[sequence * (rows / group) + row / group] >= 0; };
    if (row && !chooses(row)) return;
    wait_for_previous();
    let_next_start();
    marks += head * words;
    for (; row < rows && chooses(row); row += gridDim.y) {
        const float *of_row = scores + (head * rows + row) * stride;
        __syncthreads(); /* the row before has left shared memory */
        choose_top(
            pages, count, [&](int page) { return page_key(of_row[page]); },
            [&](int page) { atomicOr(marks + page / WARP, 1u << page % WARP); });
    }
}

/* The `count` pages of highest score of each of the rows, united per kv head.
 *
 * scores [sequences, kv_heads, rows, stride]; rows of a token tokens[row / group] < 0 choose none, and come last. Sets
 * bits of marks [sequences, kv_heads, words], one per page, which the previous kernel has cleared. Thread blocks whose
 * rows choose none leave room for others at once, but for the first, since a kernel must wait for the one before it.
 *
 * Grid: (kv_heads, blocks that share_of_block divides). Must read the scores once. */
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mark_pages(const float *scores, int rows, int stride, CachesView caches, const int *tokens, int group, int count,
               unsigned *marks, int words, int sequences, int fixed)
{
    __shared__ int scratch[MOST_SHARING];
    int token_count = rows / group; /* page_scores has waited for the tokens */
    SequenceShare mine = share_of_block(tokens, token_count, sequences, fixed, scratch, nullptr);
    int row = mine.part, sequence = mine.sequence;
    auto chooses = [&](int row) { return !tokens || tokens[sequence * token_count + row / group] >= 0; };
    if (sequence < 0 || row >= rows || !chooses(row)) {
        if (blockIdx.y == 0) wait_for_previous();
        return;
    }
    size_t head = (size_t)sequence * gridDim.x + blockIdx.x;
    CacheView cache = caches.of(sequence);
    int pages = cache.pages(*cache.length);
    wait_for_previous();
    let_next_start();
    marks += head * words;
    for (; row < rows && chooses(row); row += mine.parts) {
        const float *of_row = scores + (head * rows + row) * stride;
        __syncthreads(); /* the row before has left shared memory */
        choose_top(
            pages, count, [&](int page) { return page_key(of_row[page]); },
            [&](int page) { atomicOr(marks + page / WARP, 1u << page % WARP); });
    }
}
